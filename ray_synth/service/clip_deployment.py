"""The CLIP deployment: encoded images and texts in, unit-norm embeddings out, in batches."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import serve

from ray_synth.config import ClipConfig
from ray_synth.data.images import decode_image, decoding_bytes
from ray_synth.device import usable_cpus
from ray_synth.errors import UserError
from ray_synth.meaning.background import Background, shipped_background
from ray_synth.meaning.clip import load_clip
from ray_synth.meaning.ranking import TEMPERATURE
from ray_synth.service.full_batches import FullBatches
from ray_synth.service.llm_deployment import MAX_ONGOING
from ray_synth.service.turns import Caller, Room


@serve.deployment(name="CLIP", max_ongoing_requests=MAX_ONGOING)
class ClipDeployment:
    """Embeds images and texts with any open_clip model.

    Requests share forward passes, counted in images. Images are decoded in threads, beside the model,
    within a budget of memory and in turns between callers, no larger than the model looks at them; what
    was seen before is not embedded again.
    """

    def __init__(
        self,
        config: ClipConfig,
        max_pixels: int = 50_000_000,
        decode_bytes: int = 1_000_000_000,
    ) -> None:
        from cachetools import LRUCache

        self.config, self.max_pixels = config, max_pixels
        threads = max(2, usable_cpus())  # one of them is never at a large picture
        self.clip = load_clip(config, num_threads=usable_cpus())
        self.cache: Any = LRUCache(config.cache_images)
        self.lock = threading.Lock()
        self.decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.room = Room(decode_bytes, at_once=threads)
        # one forward at a time: two would share the same cores or GPU
        self.model_thread = ThreadPoolExecutor(1, thread_name_prefix="clip")
        self.hits = 0
        size = config.max_batch_size
        self.images = FullBatches(self._forward_images, max_size=size, size=len)
        self.texts = FullBatches(self._forward_texts, max_size=4 * size, size=len)
        self.clip.warm_up()

    async def encode_images(
        self, images: list[bytes], caller: Caller = ("", 0)
    ) -> np.ndarray | str:
        """(n, embed_dim) float32 of encoded images; or, as text, which image is wrong and how."""
        digests = [hashlib.sha256(data).digest() for data in images]
        found, todo = self._seen(digests, images)
        self.hits += len(images) - len(todo)
        pixels = await asyncio.gather(*(self._decoded(data, caller) for data in todo.values()))
        for digest, item in zip(todo, pixels, strict=True):
            if isinstance(item, str):
                return f"images[{digests.index(digest)}]: {item}"
        found |= await self._embedded(self.images, list(todo), pixels, caller)
        return np.stack([found[digest] for digest in digests])

    async def encode_texts(self, texts: list[str], caller: Caller = ("", 0)) -> np.ndarray:
        """(n, embed_dim) float32 of texts."""
        found, todo = self._seen(texts, texts)
        found |= await self._embedded(self.texts, list(todo), list(todo), caller)
        return np.stack([found[text] for text in texts])

    def _seen(self, keys: list[Any], items: list[Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """Embeddings by key of what was seen before, and the rest by key."""
        with self.lock:
            rows = {key: self.cache.get(key) for key in keys}
        todo = {key: item for key, item in zip(keys, items, strict=True) if rows[key] is None}
        return rows, todo

    async def _embedded(
        self, forward: FullBatches, keys: list[Any], items: list[Any], caller: Caller
    ) -> dict[Any, np.ndarray]:
        """Embeddings of new items, in parts that fit a batch; kept for the next time."""
        size = forward.max_size
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        rows = await asyncio.gather(*(forward(part, caller) for part in parts))
        new = dict(zip(keys, itertools.chain.from_iterable(rows), strict=True))
        with self.lock:
            for key, row in new.items() if self.config.cache_images else ():
                self.cache[key] = row
        return new

    async def _decoded(self, data: bytes, caller: Caller) -> Any:
        """The model's input for an image, or what is wrong with the image."""
        enough = 2 * self.clip.image_size
        try:
            cost = decoding_bytes(data, max_pixels=self.max_pixels, enough=enough)
        except UserError as error:
            return str(error)
        async with self.room.entered(caller, cost):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.decoders, self._decode, data, enough)

    def _decode(self, data: bytes, enough: int) -> Any:
        try:
            image = decode_image(data, max_pixels=self.max_pixels, enough=enough)
        except UserError as error:
            return str(error)
        return self.clip.preprocess(image)

    async def _forward_images(self, requests: list[list[Any]]) -> list[np.ndarray]:
        return await self._merged(self.clip.encode_pixels, requests)

    async def _forward_texts(self, requests: list[list[str]]) -> list[np.ndarray]:
        return await self._merged(self.clip.encode_texts, requests)

    async def _merged(self, encode: Any, requests: list[list[Any]]) -> list[np.ndarray]:
        """One call over all requests' items, cut back into requests."""
        items = [item for request in requests for item in request]
        loop = asyncio.get_running_loop()
        features = await loop.run_in_executor(self.model_thread, encode, items)
        ends = list(itertools.accumulate(len(request) for request in requests))
        return np.split(features, ends[:-1])

    async def background(self) -> Background:
        """What this CLIP takes pictures of many things for; see `shipped_background`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.model_thread, shipped_background, self.clip)

    def describe(self) -> dict[str, Any]:
        """The model, what it takes cosines for, and how full its batches were."""
        return {
            "model": self.config.model,
            "pretrained": self.config.pretrained,
            "dtype": str(self.clip.dtype).removeprefix("torch."),
            "device": self.clip.device,
            "context_length": self.clip.context_length,
            "temperature": self.config.temperature or TEMPERATURE,
            "merge_at": self.config.merge_similarity or self.clip.merge_similarity,
            "seen_before": self.hits,
            "batches": self.images.batches,
            "items": self.images.items,
            "mean_batch_size": self.images.items / max(self.images.batches, 1),
        }
