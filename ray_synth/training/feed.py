"""What a training worker eats: batches of decoded images, one feed a domain.

Rows `{image: encoded bytes, class_index}` in; `(images (n, 3, size, size) uint8, labels (n,) int64)`
out. Decoding happens in the feed's threads, never in the training thread.

    CachedFeed    rows in memory, shuffled anew each epoch: small real sets, finished small stores
    StreamedFeed  an endless stream of epochs through a shuffle buffer: large sets
    LiveFeed      images that are still being made: fresh ones first, then replays; never waits
    LockstepFeed  images that are still being made: each used in order; waits for them
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ray_synth.data.images import decode_image
from ray_synth.training.recipe import ImageTransform

log = logging.getLogger("ray_synth")
Row = dict[str, Any]
Batch = tuple[Tensor, Tensor]


class Decoder:
    """Encoded bytes to (3, size, size) uint8, in two halves.

    Where the transform has no randomness before batching, images are kept ready for use (`keep` does
    the work); else they are kept encoded and cropped anew at each draw (`draw` does the work).
    Corrupt images are counted and named once.
    """

    def __init__(self, transform: ImageTransform, max_pixels: int = 50_000_000) -> None:
        random = transform.augmentation
        self.ready = random.crop_scale is None and not random.rand_augment
        self.transform, self.max_pixels = transform, max_pixels
        self.corrupt: list[str] = []

    def keep(self, row: Row) -> tuple[Any, int] | None:
        """The form in which a row is held in memory; None where it cannot be decoded."""
        try:
            form = self._decode(row["image"]) if self.ready else row["image"]
            return form, int(row["class_index"])
        except ValueError as error:
            self._set_aside(row, error)
            return None

    def draw(self, form: Any) -> Tensor:
        """(3, size, size) uint8 from what `keep` gave."""
        return form if self.ready else self._decode(form)

    def batch(self, items: list[tuple[Any, int]]) -> Batch:
        return (
            torch.stack([self.draw(form) for form, _ in items]),
            torch.tensor([label for _, label in items], dtype=torch.int64),
        )

    def _decode(self, data: bytes) -> Tensor:
        pixels = np.array(decode_image(data, max_pixels=self.max_pixels))
        return self.transform.prepare(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())

    def _set_aside(self, row: Row, error: ValueError) -> None:
        name = str(row.get("image_id") or row.get("sample_id") or "an image")
        self.corrupt.append(name)
        log.warning("set aside %s: %s", name, error)


class Feed(Protocol):
    """A source of batches; `step` is the number of the training step."""

    def batch(self, step: int) -> Batch: ...

    def close(self) -> None: ...


class CachedFeed:
    """Rows in memory. Batch `step` is a function of (seed, step) alone, so resuming needs no state.

    The epochs' permutations are laid end to end and cut into batches; rank r of w takes every w-th.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        decoder: Decoder,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        kept = (decoder.keep(row) for row in rows)
        self.items = [item for item in kept if item is not None]
        if not self.items:
            raise ValueError("no image to train on could be decoded")
        self.decoder, self.batch_size, self.seed = decoder, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def batch(self, step: int) -> Batch:
        first = (step * self.world_size + self.rank) * self.batch_size
        positions = epoch_positions(first, self.batch_size, len(self.items), self.seed)
        return self.decoder.batch([self.items[at] for at in positions])

    def close(self) -> None:
        pass


def epoch_positions(first: int, count: int, length: int, seed: int) -> list[int]:
    """Entries first..first+count of the endless row of shuffled epochs over `length` items."""
    positions: list[int] = []
    while len(positions) < count:
        epoch, offset = divmod(first + len(positions), length)
        order = np.random.default_rng((seed, epoch)).permutation(length)
        positions += order[offset : offset + count - len(positions)].tolist()
    return positions


class StreamedFeed:
    """Endless epochs of a stream too large for memory, through a shuffle buffer of our own.

    Args:
        epoch: gives the rows of one epoch, by its number.
        buffer: images the shuffle buffer holds.
    """

    def __init__(
        self,
        epoch: Callable[[int], Iterable[Row]],
        decoder: Decoder,
        *,
        batch_size: int,
        seed: int,
        buffer: int,
    ) -> None:
        self.decoder, self.batch_size = decoder, batch_size
        self._items = self._shuffled(epoch, np.random.default_rng(seed), max(buffer, batch_size))

    def _shuffled(
        self, epoch: Callable[[int], Iterable[Row]], rng: np.random.Generator, buffer: int
    ) -> Iterator[tuple[Any, int]]:
        held: list[tuple[Any, int]] = []
        number = 0
        while True:
            seen = 0
            for row in epoch(number):
                item = self.decoder.keep(row)
                if item is None:
                    continue
                seen += 1
                if len(held) < buffer:
                    held.append(item)
                    continue
                at = int(rng.integers(buffer))
                held[at], item = item, held[at]
                yield item
            if not seen:
                raise ValueError("no image to train on could be decoded")
            rng.shuffle(held)
            yield from held
            held, number = [], number + 1

    def batch(self, step: int) -> Batch:
        return self.decoder.batch([next(self._items) for _ in range(self.batch_size)])

    def close(self) -> None:
        self._items.close()  # type: ignore[attr-defined]


class LiveFeed:
    """Synthetic images while they are being made: fresh ones first, then replays from a reservoir.

    A thread drains the stream. After `warmup` images `batch` never waits: when the generator is
    slow, images are drawn again (a slow generator costs freshness, not GPU time).

    Args:
        stream: image rows, ended by exhaustion; rows not accepted are passed over.
        warmup: images to wait for before the first batch.
        capacity: images kept for replay; beyond it a used image makes room.
    """

    def __init__(
        self,
        stream: Iterable[Row],
        decoder: Decoder,
        *,
        batch_size: int,
        warmup: int,
        capacity: int,
        seed: int,
    ) -> None:
        self.decoder, self.batch_size, self.capacity = decoder, batch_size, capacity
        self.warmup = max(warmup, 1)
        self.fresh: deque[tuple[Any, int]] = deque()
        self.used: list[tuple[Any, int]] = []
        self.arrived = self.replayed = 0
        self._rng = np.random.default_rng(seed)
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, args=(iter(stream),), daemon=True)
        self._thread.start()

    def _drain(self, stream: Iterator[Row]) -> None:
        try:
            for row in stream:
                item = self.decoder.keep(row) if row.get("accepted", True) else None
                with self._changed:
                    if self._closed:
                        return
                    if item is not None:
                        self.fresh.append(item)
                        self.arrived += 1
                        self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def batch(self, step: int) -> Batch:
        with self._changed:
            self._changed.wait_for(
                lambda: self.arrived >= self.warmup or self._ended or self._closed
            )
            if self._error is not None:
                raise self._error
            if not self.arrived:
                raise ValueError("no synthetic image was accepted: nothing to train on")
            taken = [self.fresh.popleft() for _ in range(min(self.batch_size, len(self.fresh)))]
            self._retire(taken)
            missing = self.batch_size - len(taken)
            self.replayed += missing
            taken += [self.used[i] for i in self._rng.integers(len(self.used), size=missing)]
        return self.decoder.batch(taken)

    def _retire(self, items: list[tuple[Any, int]]) -> None:
        for item in items:
            if len(self.used) < self.capacity:
                self.used.append(item)
            else:
                self.used[int(self._rng.integers(self.capacity))] = item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class LockstepFeed:
    """Every synthetic image fresh and in plan order; waits for each. Cycles once the plan is used.

    Args:
        stream: image rows of the whole plan, in order; those made before a restart come from the
            store, and are passed over up to `start_step`.
    """

    def __init__(
        self, stream: Iterable[Row], decoder: Decoder, *, batch_size: int, start_step: int = 0
    ) -> None:
        self.decoder, self.batch_size = decoder, batch_size
        self._items = islice(self._in_order(stream), start_step * batch_size, None)

    def _in_order(self, stream: Iterable[Row]) -> Iterator[tuple[Any, int]]:
        kept: list[tuple[Any, int]] = []
        for row in stream:
            item = self.decoder.keep(row) if row.get("accepted", True) else None
            if item is not None:
                kept.append(item)
                yield item
        if not kept:
            raise ValueError("no synthetic image was accepted: nothing to train on")
        yield from cycle(kept)

    def batch(self, step: int) -> Batch:
        return self.decoder.batch([next(self._items) for _ in range(self.batch_size)])

    def close(self) -> None:
        pass


class Prefetcher:
    """Runs feeds in a thread, a few steps ahead, and measures what the training thread waited.

    Args:
        feeds: the domains' feeds, real first; their batches are concatenated in this order.
        start: first training step.
    """

    def __init__(self, feeds: list[Feed], *, start: int, depth: int = 3) -> None:
        self.feeds = feeds
        self.waited = 0.0
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(start,), daemon=True)
        self._thread.start()

    def _run(self, step: int) -> None:
        try:
            while not self._stop.is_set():
                parts = [feed.batch(step) for feed in self.feeds]
                images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
                self._put((images, labels))
                step += 1
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def next(self) -> Batch:
        """The next step's images and labels; adds the time it had to wait to `waited`."""
        started = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        for feed in self.feeds:
            feed.close()
