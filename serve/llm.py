"""The LLM deployment: single questions in, batches to the model."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from ray import serve

from ray_synth.config import LlmConfig
from ray_synth.meaning.llm import FewShot, TransformersLLM


@serve.deployment(name="LLM", max_ongoing_requests=512)
class LlmDeployment:
    """Answers few-shot prompts with any transformers model.

    Questions that arrive together are answered in one batch; each keeps its own seed, so its answer
    does not depend on its neighbours.
    """

    def __init__(self, config: LlmConfig) -> None:
        self.config = config
        self.llm = TransformersLLM(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            device=config.device,
            max_batch_size=config.max_batch_size,
            num_threads=os.cpu_count(),
            style=config.style,
        )
        self.complete.set_max_batch_size(config.max_batch_size)  # type: ignore[attr-defined]
        self.batches: list[int] = []

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.05)
    async def complete(self, requests: list[dict[str, Any]]) -> list[str]:
        """Answer `{prompt: FewShot, seed, max_new_tokens, temperature}`; one text each."""
        self.batches.append(len(requests))
        prompts: list[FewShot] = [request["prompt"] for request in requests]
        return await asyncio.to_thread(
            self.llm.complete,
            prompts,
            max_new_tokens=max(request["max_new_tokens"] for request in requests),
            temperature=requests[0]["temperature"],
            seeds=[request["seed"] for request in requests],
            stop=requests[0]["stop"],
        )

    def describe(self) -> dict[str, Any]:
        """The model and how full its batches were."""
        mean = sum(self.batches) / len(self.batches) if self.batches else 0.0
        return {
            "model": self.config.model,
            "dtype": str(self.llm.dtype).removeprefix("torch."),
            "device": self.llm.device,
            "style": self.llm.style,
            "batches": len(self.batches),
            "mean_batch_size": mean,
        }
