"""The LLM deployment: single questions in, batches to the model."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from ray_synth.config import LlmConfig
from ray_synth.device import usable_cpus
from ray_synth.meaning.backends import load_llm
from ray_synth.meaning.few_shot import FewShot
from ray_synth.service.full_batches import FullBatches
from ray_synth.service.turns import Caller

# More than the ingress lets in: what is asked of a replica waits in its own queue, where callers take
# turns, and `describe` waits for nobody.
MAX_ONGOING = 100_000


def _options(request: dict[str, Any]) -> tuple[Any, ...]:
    """What all questions of a batch share: an answer's length must not depend on its neighbours."""
    return request["max_new_tokens"], request["temperature"], tuple(request["stop"])


def _phrases(request: tuple[list[Any], list[str]]) -> int:
    return len(request[0])


@serve.deployment(name="LLM", max_ongoing_requests=MAX_ONGOING)
class LlmDeployment:
    """Answers few-shot prompts with any of the backends.

    Questions that arrive together are answered in one batch; each keeps its own seed, so its answer
    does not depend on its neighbours.
    """

    def __init__(self, config: LlmConfig) -> None:
        self.config = config
        self.llm = load_llm(config, num_threads=usable_cpus())
        self.remote = config.backend == "openai"
        # one generation at a time on a device: two would share the same cores or GPU
        size = config.max_batch_size if self.remote else 1
        self.threads = ThreadPoolExecutor(size, thread_name_prefix="llm")
        self.asked = FullBatches(self._answer, max_size=config.max_batch_size, kind=_options)
        self.judged = FullBatches(self._score, max_size=4 * config.max_batch_size, size=_phrases)
        if not self.remote:  # the first question would pay for what is set up on demand
            self.llm.complete([FewShot("Say it.", (), "one")], max_new_tokens=1, temperature=0)

    async def complete(self, request: dict[str, Any], caller: Caller = ("", 0)) -> str:
        """Answer `{prompt: FewShot, seed, max_new_tokens, temperature, stop}`."""
        if self.remote:  # a server batches by itself
            return (await self._answer([request]))[0]
        return await self.asked(request, caller)

    async def _answer(self, requests: list[dict[str, Any]]) -> list[str]:
        """Answers to requests with the same options."""
        length, temperature, stop = _options(requests[0])
        return await self._in_thread(
            self.llm.complete,
            [request["prompt"] for request in requests],
            max_new_tokens=length,
            temperature=temperature,
            seeds=[request["seed"] for request in requests],
            stop=stop,
        )

    async def likelihood(
        self, request: tuple[list[Any], list[str]], caller: Caller = ("", 0)
    ) -> list[float] | None:
        """Log-probabilities of answers after prompts, see `Llm`."""
        return await self.judged(request, caller)

    async def _score(self, requests: list[tuple[list[Any], list[str]]]) -> list[list[float] | None]:
        prompts = [prompt for request in requests for prompt in request[0]]
        answers = [answer for request in requests for answer in request[1]]
        scores = await self._in_thread(self.llm.likelihood, prompts, answers)
        if scores is None:
            return [None] * len(requests)
        rest = iter(scores)
        return [list(itertools.islice(rest, len(request[0]))) for request in requests]

    async def _in_thread(self, call: Any, *args: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, lambda: call(*args, **options))

    def describe(self) -> dict[str, Any]:
        """The model and how full its batches were."""
        return {
            "backend": self.config.backend,
            "model": self.config.model,
            "dtype": str(getattr(self.llm, "dtype", "")).removeprefix("torch."),
            "device": self.llm.device,
            "style": self.llm.style,
            "batches": self.asked.batches,
            "items": self.asked.items,
            "mean_batch_size": self.asked.items / max(self.asked.batches, 1),
            "prompt_tokens": self.llm.usage.prompt_tokens,
            "answer_tokens": self.llm.usage.answer_tokens,
        }
