"""Models that think before they answer: told not to, given room where they do, thoughts left out."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ray_synth.errors import UserError
from ray_synth.meaning.answers import parse_meanings, without_thinking
from ray_synth.meaning.few_shot import FewShot
from ray_synth.meaning.language_model import SILENCE
from ray_synth.meaning.openai_llm import FEWEST_TOKENS, OpenAILLM
from ray_synth.meaning.transformers_llm import TransformersLLM, _past_thinking

MOUSE = FewShot("Say what a word can mean.", (("mouse", "a small rodent"),), "crane")
BIRD = "a tall wading bird"
THOUGHT = "Okay, the user wants one meaning of the word crane.\nLet me look at the examples."
Reply = tuple[int, dict[str, Any]]
Behaviour = Callable[[dict[str, Any]], Reply]


def says(content: str | None, *, finish: str = "stop", **message: Any) -> Reply:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}}
    usage = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    return 200, {
        "id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage,
        "choices": [{**choice, "finish_reason": finish}],
    }  # fmt: skip


def refuses(message: str, param: str | None = None, status: int = 400) -> Reply:
    return status, {"error": {"message": message, "type": "invalid_request_error", "param": param}}


def thinking_off(body: dict[str, Any]) -> bool:
    return (body.get("chat_template_kwargs") or {}).get("enable_thinking") is False


def qwen_on_vllm(body: dict[str, Any]) -> Reply:
    """Thinks unless it is told not to; what thinking leaves no room for is cut."""
    return says(BIRD) if thinking_off(body) else says(f"<think>\n{THOUGHT}", finish="length")


def always_thinks(body: dict[str, Any]) -> Reply:
    """Without a reasoning parser: the thought is part of the text, and stop strings end it."""
    if body.get("stop"):
        return says("<think>")
    if body["max_tokens"] < 500:
        return says(f"<think>\n{THOUGHT}", finish="length")
    return says(f"<think>\n{THOUGHT}\n</think>\n\n{BIRD}")


def always_thinks_apart(body: dict[str, Any]) -> Reply:
    """With a reasoning parser."""
    if body["max_tokens"] < 500 or body.get("stop"):
        return says(None, finish="length", reasoning_content=THOUGHT)
    return says(f"\n\n{BIRD}", reasoning_content=THOUGHT)


def openai_reasoning(body: dict[str, Any]) -> Reply:
    """As OpenAI's own service answers for its reasoning models."""
    if "chat_template_kwargs" in body:
        return refuses("Unrecognized request argument supplied: chat_template_kwargs")
    if "max_tokens" in body:
        return refuses(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.", "max_tokens",
        )  # fmt: skip
    if body["temperature"] != 1 if "temperature" in body else False:
        return refuses("Unsupported value: 'temperature' does not support 0.8", "temperature")
    if "stop" in body:
        return refuses("Unsupported parameter: 'stop' is not supported with this model.", "stop")
    return says(BIRD if body["max_completion_tokens"] > 500 else "", finish="length")


def strict(body: dict[str, Any]) -> Reply:
    """Does not say what it does not know."""
    return refuses("Bad request") if "chat_template_kwargs" in body else says(BIRD)


def fastapi(body: dict[str, Any]) -> Reply:
    """Says it with another status, and without an `error`."""
    if "chat_template_kwargs" in body:
        detail = [{"type": "extra_forbidden", "loc": ["body", "chat_template_kwargs"]}]
        return 422, {"detail": detail}
    return says(BIRD)


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], tuple[OpenAILLM, list[dict[str, Any]]]]]:
    """Start a server with a behaviour: its client, and the bodies that it was sent."""
    servers = []

    def start(behaviour: Behaviour) -> tuple[OpenAILLM, list[dict[str, Any]]]:
        bodies: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                status, reply = behaviour(bodies[-1])
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}/v1"
        return OpenAILLM("Qwen/Qwen3-8B", base_url=url, max_concurrency=1), bodies

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(llm: OpenAILLM, count: int = 2) -> list[str]:
    return llm.complete([MOUSE] * count, max_new_tokens=16, stop=("\n",))


@pytest.mark.parametrize(
    ("behaviour", "requests"),
    [
        (qwen_on_vllm, 2),
        (always_thinks, 1 + 2),  # the first question twice, the others once
        (always_thinks_apart, 1 + 2),
        (openai_reasoning, 4 + 1 + 1 + 1),  # the arguments, the room, the second question
        (strict, 1 + 2),
        (fastapi, 1 + 2),
    ],
)
def test_every_kind_of_server_gives_answers_without_thoughts(serve, behaviour, requests):
    llm, bodies = serve(behaviour)
    assert ask(llm) == [BIRD, BIRD]
    assert parse_meanings(BIRD, "crane")[0] == [BIRD]
    assert llm.usage.questions == 2 and not llm.usage.empty
    assert thinking_off(bodies[0])
    assert len(bodies) == requests


def test_short_answers_stay_short_where_nobody_thinks(serve):
    llm, bodies = serve(qwen_on_vllm)
    ask(llm)
    assert {body["max_tokens"] for body in bodies} == {FEWEST_TOKENS}


def test_what_a_server_does_not_take_is_said_once(serve, caplog):
    llm, _ = serve(strict)
    with caplog.at_level(logging.WARNING, "ray_synth"):
        ask(llm, 3)
    assert [record.message for record in caplog.records] == [
        "Qwen/Qwen3-8B does not take chat_template_kwargs; asking without"
    ]


def test_one_question_that_is_refused_does_not_switch_thinking_on(serve):
    refused = []

    def too_long(body: dict[str, Any]) -> Reply:
        if len(refused) < 2:
            refused.append(body)
            return refuses("This model's maximum context length is 128 tokens")
        return qwen_on_vllm(body)

    llm, bodies = serve(too_long)
    with pytest.raises(UserError, match="refuses the question.*maximum context length"):
        ask(llm, 1)
    assert ask(llm) == [BIRD, BIRD]
    assert thinking_off(bodies[-1])


@pytest.mark.parametrize("content", ["", None, f"<think>{THOUGHT}"])
def test_a_model_that_never_answers_is_named(serve, content):
    llm, _ = serve(lambda _: says(content, finish="length"))
    ask(llm, SILENCE - 1)  # may be an accident yet
    with pytest.raises(UserError, match=r"the LLM 'Qwen/Qwen3-8B' at http.*nothing to all of 10"):
        ask(llm, 1)


def test_single_empty_answers_are_no_error(serve):
    turns = iter([*[""] * (SILENCE - 1), BIRD, *[""] * 30])
    llm, _ = serve(lambda _: says(next(turns)))
    assert ask(llm, 20)[SILENCE - 1] == BIRD


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (BIRD, BIRD),
        (f"<think>\n{THOUGHT}\n</think>\n\n{BIRD}", BIRD),
        (f"{THOUGHT}\n</think>\n\n{BIRD}", BIRD),  # the template had begun it
        (f"[THINK]{THOUGHT}[/THINK]{BIRD}", BIRD),
        (f"<seed:think>{THOUGHT}</seed:think>{BIRD}", BIRD),
        (f"<think></think>{BIRD}<think>{THOUGHT}", BIRD),
        (f"<think>\n{THOUGHT}", ""),
        ("<Think>", ""),
        ("  a bird", "  a bird"),
    ],
)
def test_thoughts_are_no_part_of_an_answer(text, left):
    assert without_thinking(text) == left
    assert MOUSE.answer_in(text, ("\n",)) == left


# as published with the models, shortened to what opens an answer
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
R1 = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|Assistant|><think>\n"
GPT_OSS = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort }}<|end|>{% for m in messages %}"
    "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant"
)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (R1, "<|Assistant|><think>\n\n</think>\n\n"),
        (GPT_OSS, "<|start|>assistant<|channel|>final<|message|>"),
    ],
    ids=["qwen3", "r1", "gpt-oss"],
)
def test_a_local_model_is_asked_past_its_thinking(embedded_llm: TransformersLLM, template, end):
    tokenizer, style = embedded_llm._tokenizer, embedded_llm.style
    published = tokenizer.chat_template
    try:
        tokenizer.chat_template, embedded_llm.style = template, "chat"
        text = tokenizer.decode(embedded_llm._encode(MOUSE))
        assert text.endswith(end)
        assert (text.count("crane") == 1 and "Reasoning: low" in text) or template != GPT_OSS
    finally:
        tokenizer.chat_template, embedded_llm.style = published, style
    assert _past_thinking("<think>\n\n</think>\n\n") == "<think>\n\n</think>\n\n"


def test_a_local_model_that_never_answers_is_named(embedded_llm: TransformersLLM, monkeypatch):
    monkeypatch.setattr(embedded_llm, "usage", type(embedded_llm.usage)())
    silent = {"max_new_tokens": 1, "stop": (" ", "\n", "")}  # an answer ends before its beginning
    with pytest.raises(UserError, match="the LLM 'embedded' has answered nothing to all of 10"):
        embedded_llm.complete([MOUSE] * SILENCE, **silent)
