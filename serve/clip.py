"""The CLIP deployment: pictures and texts in, unit-norm embeddings out, in batches."""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import Any

import numpy as np
from ray import serve

from ray_synth.config import ClipConfig
from ray_synth.meaning.clip import ClipModel


@serve.deployment(name="CLIP", max_ongoing_requests=512)
class ClipDeployment:
    """Embeds pictures and texts with any open_clip model; requests share forward passes."""

    def __init__(self, config: ClipConfig) -> None:
        self.config = config
        self.clip = ClipModel(
            config.model,
            config.pretrained,
            device=config.device,
            dtype=config.dtype,
            num_threads=os.cpu_count(),
            max_batch_size=config.max_batch_size,
        )

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.02)
    async def encode_images(self, requests: list[list[Any]]) -> list[np.ndarray]:
        """Each request a list of RGB pictures; (n, embed_dim) float32 each."""
        return await asyncio.to_thread(_merged, self.clip.encode_images, requests)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.02)
    async def encode_texts(self, requests: list[list[str]]) -> list[np.ndarray]:
        """Each request a list of texts; (n, embed_dim) float32 each."""
        return await asyncio.to_thread(_merged, self.clip.encode_texts, requests)

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.config.model,
            "pretrained": self.config.pretrained,
            "dtype": str(self.clip.dtype).removeprefix("torch."),
            "device": self.clip.device,
            "context_length": self.clip.context_length,
        }


def _merged(encode: Any, requests: list[list[Any]]) -> list[np.ndarray]:
    """One call over all requests' items, cut back into requests."""
    features = encode([item for request in requests for item in request])
    ends = list(itertools.accumulate(len(request) for request in requests))
    return np.split(features, ends[:-1])
