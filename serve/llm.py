"""The LLM deployment: single questions in, batches to the model."""

from __future__ import annotations

import asyncio
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from ray_synth.config import LlmConfig
from ray_synth.meaning.backends import load_llm
from ray_synth.meaning.llm import FewShot


@serve.deployment(name="LLM", max_ongoing_requests=512)
class LlmDeployment:
    """Answers few-shot prompts with any of the backends.

    Questions that arrive together are answered in one batch; each keeps its own seed, so its answer
    does not depend on its neighbours.
    """

    def __init__(self, config: LlmConfig) -> None:
        self.config = config
        self.llm = load_llm(config, num_threads=os.cpu_count())
        self._complete_batch.set_max_batch_size(config.max_batch_size)  # type: ignore[attr-defined]
        self.remote = config.backend == "openai"
        # one generation at a time on a device: two would share the same cores or GPU
        size = config.max_batch_size if self.remote else 1
        self.threads = ThreadPoolExecutor(size, thread_name_prefix="llm")
        self.batches = self.questions = 0
        if not self.remote:  # the first question would pay for what is set up on demand
            self.llm.complete([FewShot("Say it.", (), "one")], max_new_tokens=1, temperature=0)

    async def complete(self, request: dict[str, Any]) -> str:
        """Answer `{prompt: FewShot, seed, max_new_tokens, temperature, stop}`."""
        if self.remote:  # a server batches by itself
            return (await self._answer([request]))[0]
        return await self._complete_batch(request)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.02)
    async def _complete_batch(self, requests: list[dict[str, Any]]) -> list[str]:
        return await self._answer(requests)

    async def _answer(self, requests: list[dict[str, Any]]) -> list[str]:
        self.batches += 1
        self.questions += len(requests)
        answers = [""] * len(requests)

        def options(i: int) -> tuple[Any, ...]:
            request = requests[i]
            return request["max_new_tokens"], request["temperature"], tuple(request["stop"])

        # Only like questions share a batch: an answer's length must not depend on its neighbours.
        for (length, temperature, stop), group in itertools.groupby(
            sorted(range(len(requests)), key=options), key=options
        ):
            rows = list(group)
            texts = await self._in_thread(
                self.llm.complete,
                [requests[i]["prompt"] for i in rows],
                max_new_tokens=length,
                temperature=temperature,
                seeds=[requests[i]["seed"] for i in rows],
                stop=stop,
            )
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text
        return answers

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.02)
    async def likelihood(
        self, requests: list[tuple[list[Any], list[str]]]
    ) -> list[list[float] | None]:
        """Each request prompts and answers; the answers' log-probabilities, see `Llm`."""
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
            "batches": self.batches,
            "items": self.questions,
            "mean_batch_size": self.questions / self.batches if self.batches else 0.0,
            "prompt_tokens": self.llm.usage.prompt_tokens,
            "answer_tokens": self.llm.usage.answer_tokens,
        }
