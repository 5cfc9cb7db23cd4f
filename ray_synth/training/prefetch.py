"""Runs the feeds a few batches ahead of training, and measures what training waited for them.

Draws, the copy to the device and augmentation happen in this thread, decoding here or in the decoder's
processes; on a GPU in a stream of their own, beside the forward and backward passes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ray_synth.training.decoder import Batch, Decoder, Draw
from ray_synth.training.feed import Feed

DEPTH = 3  # batches
Finish = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Prepared(NamedTuple):
    """A batch on its device: images (n, 3, size, size) float32, labels (n,), what to learn from them
    ((n,) labels or (n, classes) probabilities), and the images' ids."""

    images: Tensor
    labels: Tensor
    targets: Tensor
    names: list[str]
    ready: Any = None


class Prefetcher:
    """Batches of all feeds, concatenated in their order (real first).

    Args:
        start: number of the first batch.
        finish: (images uint8, labels, number of the batch) on the device -> images, targets.
    """

    def __init__(
        self,
        feeds: list[Feed],
        decoder: Decoder,
        *,
        start: int,
        finish: Finish | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.feeds, self.decoder = feeds, decoder
        self.finish, self.device = finish, torch.device(device)
        self.waited = 0.0
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._queue: queue.Queue[Prepared | BaseException] = queue.Queue(maxsize=DEPTH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(start,), daemon=True)
        self._thread.start()

    def _run(self, start: int) -> None:
        batches = self.decoder.batches(self._draws(start))
        try:
            for number in count(start):
                batch = next(batches)
                with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                    self._put(self._prepare(batch, number))
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._put(error)
        finally:
            batches.close()  # the decoder's processes end

    def _draws(self, start: int) -> Iterator[list[Draw]]:
        return ([feed.draw(number) for feed in self.feeds] for number in count(start))

    def _prepare(self, batch: Batch, number: int) -> Prepared:
        images, labels = batch.images, batch.labels
        if self._stream:
            images, labels = images.pin_memory(), labels.pin_memory()
        images = images.to(self.device, non_blocking=True)
        labels = targets = labels.to(self.device, non_blocking=True)
        if self.finish is not None:
            images, targets = self.finish(images, labels, number)
        elif not self._stream:
            images = images.clone()  # the decoder writes the next ones there
        ready = self._stream.record_event() if self._stream else None
        return Prepared(images, labels, targets, batch.names, ready)

    def _put(self, item: Prepared | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def next(self) -> Prepared:
        """The next batch; adds the time it had to wait to `waited`."""
        started = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        if item.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(item.ready)
            for tensor in (item.images, item.labels, item.targets):
                tensor.record_stream(current)  # or its memory might be used again too early
        return item

    def close(self) -> None:
        self._stop.set()
        for feed in self.feeds:
            feed.close()
