"""A server that speaks OpenAI's API: the embedded model behind real HTTP, with real failures."""

import json
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from ray_synth.config import LlmConfig
from ray_synth.meaning import openai_llm
from ray_synth.meaning.answer_cache import AnswerCache
from ray_synth.meaning.backends import load_llm
from ray_synth.meaning.few_shot import FewShot
from ray_synth.meaning.transformers_llm import TransformersLLM

QUESTION = FewShot(
    "What each word can mean.", (("q", "the letter Q"),), "seven", ("Word", "Meaning")
)


class Server:
    """Answers with the embedded model; fails on demand; notes what it was asked."""

    def __init__(self, llm: TransformersLLM) -> None:
        self.llm = llm
        self.failures: list[int] = []
        self.requests: list[dict] = []
        self.times: list[float] = []
        self.delay = 0.0
        self.api = FastAPI()
        self.api.post("/v1/chat/completions")(self.chat)
        self.api.post("/v1/completions")(self.text)

    def answer(self, prompt: FewShot, body: dict) -> str:
        return self.llm.complete(
            [prompt], max_new_tokens=8, temperature=body["temperature"], seeds=[body["seed"]]
        )[0].strip()

    async def checked(self, request: Request) -> dict | JSONResponse:
        body = await request.json()
        self.requests.append({**body, "authorization": request.headers.get("authorization")})
        self.times.append(time.monotonic())
        time.sleep(self.delay)
        if self.failures:
            status = self.failures.pop(0)
            return JSONResponse({"error": {"message": "no"}}, status, {"retry-after": "0"})
        if request.headers.get("authorization") != "Bearer sesame":
            return JSONResponse({"error": {"message": "bad token"}}, 401)
        if body["model"] != "smol":
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        return body

    async def chat(self, request: Request):
        body = await self.checked(request)
        if isinstance(body, JSONResponse):
            return body
        text = self.answer(QUESTION, body)
        if "response_format" in body:
            text = json.dumps({"answer": text})
        message = {"role": "assistant", "content": text}
        return self.reply({"index": 0, "message": message, "finish_reason": "stop"})

    async def text(self, request: Request):
        body = await self.checked(request)
        if isinstance(body, JSONResponse):
            return body
        return self.reply(
            {"index": 0, "text": self.answer(QUESTION, body), "finish_reason": "stop"}
        )

    def reply(self, choice: dict) -> dict:
        usage = {"prompt_tokens": 40, "completion_tokens": 5, "total_tokens": 45}
        return {"id": "1", "object": "x", "created": 1, "model": "smol", "choices": [choice]} | {
            "usage": usage
        }


@pytest.fixture(scope="module")
def running(embedded_llm: TransformersLLM) -> Iterator[tuple[Server, str]]:
    server = Server(embedded_llm)
    app = uvicorn.Server(uvicorn.Config(server.api, port=0, log_level="warning"))
    thread = threading.Thread(target=app.run, daemon=True)
    thread.start()
    while not app.started:
        time.sleep(0.05)
    port = app.servers[0].sockets[0].getsockname()[1]
    yield server, f"http://127.0.0.1:{port}/v1"
    app.should_exit = True
    thread.join(10)


@pytest.fixture
def server(running, monkeypatch) -> tuple[Server, dict]:
    monkeypatch.setenv("SMOL_TOKEN", "sesame")
    running[0].requests.clear()
    running[0].times.clear()
    running[0].failures.clear()
    running[0].delay = 0.0
    settings = {"backend": "openai", "model": "smol", "base_url": running[1]}
    return running[0], {**settings, "api_key_env": "SMOL_TOKEN"}


@pytest.mark.parametrize(
    "how", [{}, {"structured": True}, {"style": "completion"}], ids=["chat", "structured", "text"]
)
def test_answers_come_in_order_with_their_seeds(server, how):
    serving, settings = server
    llm = load_llm(LlmConfig(**settings, **how))
    answers = llm.complete([QUESTION] * 3, seeds=[1, 2, 1], stop=("\n",))
    assert answers[0] == answers[2] != ""
    assert answers[0] == serving.answer(QUESTION, {"temperature": 0.8, "seed": 1}).split("\n")[0]
    assert sorted(request["seed"] for request in serving.requests) == [1, 1, 2]
    assert llm.usage.questions == 3 and llm.usage.prompt_tokens == 120
    assert ("response_format" in serving.requests[0]) == bool(how.get("structured"))
    assert llm.likelihood([QUESTION], ["x"]) is None


def test_a_busy_or_broken_server_is_asked_again(server):
    serving, settings = server
    serving.failures += [429, 503, 500]
    assert load_llm(LlmConfig(**settings)).complete([QUESTION], seeds=[1])[0]
    assert len(serving.requests) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"api_key_env": "NO_SUCH_TOKEN"}, "set the environment variable NO_SUCH_TOKEN"),
        ({"model": "gpt-none"}, "does not know 'gpt-none'"),
        ({"base_url": "http://127.0.0.1:9/v1"}, "cannot be reached"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(server, change, says, monkeypatch):
    monkeypatch.setattr(openai_llm, "MAX_RETRIES", 0)
    _, settings = server
    llm = load_llm(LlmConfig(**{**settings, **change}))
    with pytest.raises(ValueError, match=says) as caught:
        llm.complete([QUESTION])
    assert "sesame" not in str(caught.value)


def test_a_slow_server_is_not_waited_for_for_ever(server, monkeypatch):
    monkeypatch.setattr(openai_llm, "MAX_RETRIES", 0)
    serving, settings = server
    serving.delay = 1.0
    llm = load_llm(LlmConfig(**settings, timeout_s=0.2))
    with pytest.raises(ValueError, match="cannot be reached"):
        llm.complete([QUESTION])


def test_no_more_questions_a_minute_than_allowed(server):
    serving, settings = server
    llm = load_llm(LlmConfig(**settings, requests_per_minute=60))
    began = time.monotonic()
    llm.complete([QUESTION] * 4)
    assert max(serving.times) - began > 1.8


def test_openais_own_service_needs_a_token(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="set the environment variable OPENAI_API_KEY"):
        load_llm(LlmConfig(backend="openai", model="gpt"))


def test_answers_are_kept_by_model_and_prompt(server, tmp_path):
    serving, settings = server
    config = LlmConfig(**settings, cache_dir=str(tmp_path / "answers"))
    first = load_llm(config).complete([QUESTION] * 2, seeds=[1, 2])
    assert len(serving.requests) == 2
    again = load_llm(config)  # another process would find them as well
    assert again.complete([QUESTION] * 3, seeds=[2, 1, 3])[:2] == first[::-1]
    assert len(serving.requests) == 3
    again.complete([QUESTION], seeds=[1], temperature=0.1)
    load_llm(config.model_copy(update={"style": "completion"})).complete([QUESTION], seeds=[1])
    assert len(serving.requests) == 5


def test_a_broken_cache_costs_no_answer(server, tmp_path):
    _, settings = server
    llm = load_llm(LlmConfig(**settings, cache_dir=str(tmp_path)))
    llm.cache._db.execute("DROP TABLE answers")
    assert llm.complete([QUESTION], seeds=[1])[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="give llm.cache_dir a folder"):
        AnswerCache(tmp_path / "file" / "below")


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="needs the model's name"):
        LlmConfig(backend="openai")
    with pytest.raises(ValueError, match="belong to backend: openai"):
        LlmConfig(base_url="http://x")
    with pytest.raises(ValueError, match="fewest, most"):
        LlmConfig(replicas=(3, 1))
