"""A language model behind any server that speaks OpenAI's HTTP API (vLLM, ray.serve.llm, a cloud).

Few-shot prompts go in, one raw text per prompt comes out, as with `TransformersLLM`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from ray_synth.errors import UserError, first_line
from ray_synth.meaning.answers import without_thinking
from ray_synth.meaning.few_shot import THINKING_OFF, FewShot
from ray_synth.meaning.language_model import Usage

log = logging.getLogger("ray_synth")
MAX_RETRIES = 5  # times that a busy or broken server is asked again
MOST_STOPS = 4  # what OpenAI's own service takes
# A server may count reasoning or a sentence's opening as tokens; answers are cut by `stop` anyway.
FEWEST_TOKENS = 48
# What models that think whatever they are told get on top of it.
THINKING_TOKENS = 2048
# What some servers and models refuse, and questions can be asked without.
DISPENSABLE = ("max_tokens", "temperature", "stop", "seed")
ANSWER_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"answer": {"type": "string", "description": "one short phrase"}},
            "required": ["answer"],
            "additionalProperties": False,
        },
    },
}


class OpenAILLM:
    """Answers few-shot prompts through an OpenAI-compatible server.

    Waits for the server are bounded by `timeout_s`; busy (429), broken (5xx) and unreachable servers
    are asked again by the client library, which honours Retry-After. Models that think before they
    answer are told not to (`chat_template_kwargs`); those that do all the same get the room for it.

    Args:
        model: the model's name on the server.
        base_url: the server's API, such as http://localhost:8000/v1; None is OpenAI's own.
        api_key_env: environment variable that holds the token; servers without one need none.
        timeout_s: seconds that one question may take.
        requests_per_minute: how many questions are sent at most; None: we set no limit.
        max_concurrency: questions in flight.
        style: "chat" and "auto" use chat completions, "completion" plain ones (base models).
        structured: ask for JSON by schema, where the server has structured output.

    Raises:
        UserError: the token is missing or refused, the server or the model is not available, or all
            its answers are empty.
    """

    device = "remote"

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 60.0,
        requests_per_minute: int | None = None,
        max_concurrency: int = 16,
        style: Literal["auto", "completion", "chat"] = "auto",
        structured: bool = False,
    ) -> None:
        import openai

        token = os.environ.get(api_key_env)
        if not token and base_url is None:
            raise UserError(
                f"no token for the LLM {model!r}: set the environment variable {api_key_env}, or "
                "llm.base_url where a server of your own needs none"
            )
        if structured and style == "completion":
            raise UserError(
                "llm.structured needs llm.style 'chat': plain completions have no schema"
            )
        self.name = model
        self.style = "completion" if style == "completion" else "chat"
        self.structured = structured
        self.dtype = "remote"
        self.usage = Usage()
        self._where = base_url or "https://api.openai.com/v1"
        self._api_key_env = api_key_env
        self._client = openai.OpenAI(
            api_key=token or "none",
            base_url=base_url,
            timeout=timeout_s,
            max_retries=MAX_RETRIES,
        )
        self._threads = ThreadPoolExecutor(max_concurrency, thread_name_prefix="openai")
        self._limiter = limiter(requests_per_minute)
        self._thinks = False  # known from its first answer that was nothing but a thought
        self._refused: frozenset[str] = frozenset()  # arguments that the server does not take

    def complete(
        self,
        prompts: Sequence[FewShot],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = ("\n\n",),
    ) -> list[str]:
        """One answer per prompt, in order; see `TransformersLLM.complete`.

        A seed is passed on; whether it is kept is the server's affair. A refusal or an empty choice
        is an empty answer.
        """
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        options = {"max_tokens": max(max_new_tokens, FEWEST_TOKENS), "temperature": temperature}
        jobs = [
            self._threads.submit(self._answer, prompt, seed, stop, options)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        answers = [job.result() for job in jobs]
        if self.usage.is_silent():
            raise UserError(
                f"the LLM {self.name!r} at {self._where} has answered nothing to all of "
                f"{self.usage.questions} questions, though it had {THINKING_TOKENS} tokens to think: "
                "take one that answers without thinking first (such as an -Instruct model), or look "
                "at the server's log"
            )
        return answers

    def likelihood(self, prompts: Sequence[FewShot | str], answers: Sequence[str]) -> None:
        """Chat servers do not say how likely a given text is."""

    def _answer(self, prompt: FewShot, seed: int, stop: Sequence[str], options: Any) -> str:
        thinks = self._thinks
        text, cut = self._ask(prompt, seed, stop, options, room=THINKING_TOKENS if thinks else 0)
        if cut and not thinks:  # it thinks all the same: from now on it has room for it
            self._thinks = True
            text, _ = self._ask(prompt, seed, stop, options, room=THINKING_TOKENS)
        self.usage.add(0, 0, questions=1, empty=not text.strip())
        return text

    def _ask(
        self, prompt: FewShot, seed: int, stop: Sequence[str], options: Any, *, room: int
    ) -> tuple[str, bool]:
        """The answer, and whether it was lost to thinking.

        Args:
            room: tokens that it may think for.
        """
        arguments = {
            **options,
            "model": self.name,
            "seed": seed % 2**31,
            # a line's end within a thought must not end the answer
            "stop": None if room or self.structured else list(stop)[:MOST_STOPS] or None,
        }
        arguments["max_tokens"] += room
        if self.style == "chat":
            arguments["extra_body"] = {"chat_template_kwargs": THINKING_OFF}
            arguments["messages"] = prompt.as_messages()
            if self.structured:
                arguments["response_format"] = ANSWER_SCHEMA
        else:
            arguments["prompt"] = prompt.as_text()
        reply = self._send(arguments)
        if reply.usage is not None:
            self.usage.add(reply.usage.prompt_tokens, reply.usage.completion_tokens, questions=0)
        if not reply.choices:
            return "", False
        choice = reply.choices[0]
        thought = ""
        if self.style == "chat":
            more = choice.message.model_extra or {}
            thought = more.get("reasoning_content") or more.get("reasoning") or ""
            text = (choice.message.content or "").lstrip()
        else:
            text = choice.text
        answer = without_thinking(text)
        cut = not answer.strip() and bool(text or thought or choice.finish_reason == "length")
        answer = _from_json(answer) if self.structured else answer
        return prompt.answer_in(answer, stop), cut

    def _send(self, arguments: dict[str, Any]) -> Any:
        """The server's reply; an argument that it does not take is left out, from then on."""
        import openai

        if self._limiter is not None:
            self._limiter.try_acquire("question", blocking=True)
        chat = self.style == "chat"
        create: Any = (
            self._client.chat.completions.create if chat else self._client.completions.create
        )
        refused = self._refused
        while True:
            taken = _without(arguments, refused)
            try:
                reply = create(**taken)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                argument = _refused_argument(error, taken)
                if argument is None:
                    raise UserError(f"{self._where} refuses the question: {error}") from None
                refused |= {argument}
            except openai.OpenAIError as error:
                raise self._explained(error) from None
            else:
                if new := refused - self._refused:  # without them it answers: they were the reason
                    log.warning("%s does not take %s; asking without", self.name, ", ".join(new))
                    self._refused |= new
                return reply

    def _explained(self, error: Exception) -> UserError:
        """What a failure of the server means, and what to do."""
        import openai

        if isinstance(error, openai.AuthenticationError):
            fix = f"set the environment variable {self._api_key_env}"
            return UserError(f"{self._where} refuses the token: {fix}")
        if isinstance(error, openai.NotFoundError):
            return UserError(f"{self._where} does not know {self.name!r}: {error}")
        if isinstance(error, openai.APIConnectionError):
            return UserError(
                f"the LLM server {self._where} cannot be reached ({error}): check llm.base_url, and "
                "that the server is up"
            )
        code = getattr(error, "status_code", type(error).__name__)  # still, after MAX_RETRIES
        return UserError(
            f"{self._where} fails ({code}: {first_line(error)}): ask again later, or see "
            "llm.requests_per_minute"
        )


def _without(arguments: dict[str, Any], refused: frozenset[str]) -> dict[str, Any]:
    """The arguments, but for those that this server refused; a limit has two names."""
    taken = {name: value for name, value in arguments.items() if name not in refused}
    if "max_tokens" in refused:
        taken["max_completion_tokens"] = arguments["max_tokens"]
    if "chat_template_kwargs" in refused:
        del taken["extra_body"]
    return taken


def _refused_argument(error: Any, sent: dict[str, Any]) -> str | None:
    """Which of the arguments that can be done without a 400 or 422 is about; None: about none."""
    names = [*(name for name in DISPENSABLE if name in sent), *sent.get("extra_body", ())]
    named = [name for name in names if re.search(rf"\b{name}\b", f"{error.param} {error}")]
    # servers that refuse unknown arguments do not all say which
    unnamed = "chat_template_kwargs" if "extra_body" in sent else None
    return error.param if error.param in names else (named or [unnamed])[0]


def _from_json(text: str) -> str:
    """The answer in a structured reply; a server that ignored the schema is taken at its word."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return (
        found["answer"]
        if isinstance(found, dict) and isinstance(found.get("answer"), str)
        else text
    )


def limiter(requests_per_minute: int | None) -> Any:
    """What lets so many requests a minute pass, evenly; None where there is no limit."""
    if requests_per_minute is None:
        return None
    from pyrate_limiter import Duration, Limiter, Rate

    # a minute's worth at once would be a burst that many servers refuse
    per_second = requests_per_minute / 60
    rates = [Rate(requests_per_minute, Duration.MINUTE)]
    if per_second >= 1:
        rates.insert(0, Rate(int(per_second), Duration.SECOND))
    return Limiter(rates)
