"""A language model behind any server that speaks OpenAI's HTTP API (vLLM, ray.serve.llm, a cloud).

Few-shot prompts go in, one raw text per prompt comes out, as with `TransformersLLM`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from ray_synth.errors import UserError, first_line
from ray_synth.meaning.few_shot import FewShot
from ray_synth.meaning.language_model import Usage

MAX_RETRIES = 5  # times that a busy or broken server is asked again
MOST_STOPS = 4  # what OpenAI's own service takes
# A server may count reasoning or a sentence's opening as tokens; answers are cut by `stop` anyway.
FEWEST_TOKENS = 48
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
    are asked again by the client library, which honours Retry-After.

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
        UserError: the token is missing or refused, or the server or the model is not available.
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
        self._limiter = _limiter(requests_per_minute)

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
        options = {
            "max_tokens": max(max_new_tokens, FEWEST_TOKENS),
            "temperature": temperature,
            "stop": list(stop)[:MOST_STOPS] or None,
        }
        jobs = [
            self._threads.submit(self._answer, prompt, seed, stop, options)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [job.result() for job in jobs]

    def likelihood(self, prompts: Sequence[FewShot | str], answers: Sequence[str]) -> None:
        """Chat servers do not say how likely a given text is."""

    def _answer(self, prompt: FewShot, seed: int, stop: Sequence[str], options: Any) -> str:
        import openai

        if self._limiter is not None:
            self._limiter.try_acquire("question", blocking=True)
        options = {**options, "model": self.name, "seed": seed % 2**31}
        try:
            if self.style == "completion":
                answer = self._client.completions.create(prompt=prompt.as_text(), **options)
                text = answer.choices[0].text if answer.choices else ""
            else:
                if self.structured:
                    options |= {"response_format": ANSWER_SCHEMA, "stop": None}
                messages: Any = prompt.as_messages()
                answer = self._client.chat.completions.create(messages=messages, **options)
                text = answer.choices[0].message.content or "" if answer.choices else ""
        except openai.AuthenticationError:
            raise UserError(
                f"{self._where} refuses the token: set the environment variable {self._api_key_env}"
            ) from None
        except openai.NotFoundError as error:
            raise UserError(f"{self._where} does not know {self.name!r}: {error}") from None
        except openai.APIConnectionError as error:
            raise UserError(
                f"the LLM server {self._where} cannot be reached ({error}): check llm.base_url, and "
                "that the server is up"
            ) from None
        except openai.BadRequestError as error:
            raise UserError(f"{self._where} refuses the question: {error}") from None
        except openai.APIStatusError as error:  # still, after MAX_RETRIES
            raise UserError(
                f"{self._where} fails ({error.status_code}: {first_line(error)}): ask again later, or "
                "see llm.requests_per_minute"
            ) from None
        if answer.usage is not None:
            self.usage.add(answer.usage.prompt_tokens, answer.usage.completion_tokens)
        text = _from_json(text) if self.structured else text
        return prompt.answer_in(text, stop)


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


def _limiter(requests_per_minute: int | None) -> Any:
    if requests_per_minute is None:
        return None
    from pyrate_limiter import Duration, Limiter, Rate

    # a minute's worth at once would be a burst that many servers refuse
    per_second = requests_per_minute / 60
    rates = [Rate(requests_per_minute, Duration.MINUTE)]
    if per_second >= 1:
        rates.insert(0, Rate(int(per_second), Duration.SECOND))
    return Limiter(rates)
