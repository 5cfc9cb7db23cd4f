"""What a training worker reads: batches of decoded images, one feed per domain.

Rows `{image: encoded bytes, class_index}` in; a `Batch` of (n, 3, size, size) uint8 images per step out.
`batch` is called in the prefetcher's thread, never in the training thread.

    CachedFeed    rows in memory, reshuffled each epoch: small real sets, finished small stores
    StreamedFeed  an endless stream of epochs through a shuffle buffer: large sets
    LiveFeed      images that are still being made: fresh ones first, then replays; never waits
    LockstepFeed  images that are still being made: each used in order; waits for them
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Protocol

import numpy as np

from ray_synth.errors import UserError
from ray_synth.training.decoder import Batch, Decoder, Item, Row
from ray_synth.training.recipe import balanced_weights
from ray_synth.training.reservoir import Reservoir

CAPACITY = 20_000  # images that a live feed holds for replay
MEMORY_BYTES = 2 << 30


class Feed(Protocol):
    """A source of batches; `step` is the number of the batch."""

    def batch(self, step: int) -> Batch: ...

    def close(self) -> None: ...


def derived_seed(*numbers: int) -> int:
    """A seed below 2^63 for each tuple of non-negative numbers, unrelated for neighbouring ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class CachedFeed:
    """Rows in memory. Batch `step` is a function of (seed, step) alone, so resuming needs no state.

    The epochs' orders are laid end to end and cut into batches; rank r of w takes every w-th.

    Args:
        balance: 0 draws each image once per epoch; 1 draws all classes equally often, so that images
            of rare classes come several times and of frequent ones not in every epoch.
        repeats: each image is drawn this many times in a row, augmented differently each time
            (repeated augmentation, arXiv 1901.09335).
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
        balance: float = 0.0,
        repeats: int = 1,
    ) -> None:
        self.items = decoder.keep_all(rows)
        if not self.items:
            raise UserError("no image to train on could be decoded")
        self.decoder, self.batch_size, self.seed = decoder, batch_size, seed
        self.rank, self.world_size, self.repeats = rank, world_size, repeats
        labels = np.array([item.label for item in self.items])
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(labels, seed, epoch, balance))

    def batch(self, step: int) -> Batch:
        first = (step * self.world_size + self.rank) * self.batch_size
        items = []
        for number in range(first, first + self.batch_size):
            epoch, at = divmod(number // self.repeats, len(self.items))
            items.append(self.items[self._order(epoch)[at]])
        return self.decoder.batch(items, derived_seed(self.seed, step, self.rank))

    def close(self) -> None:
        pass


def epoch_order(labels: np.ndarray, seed: int, epoch: int, balance: float = 0.0) -> np.ndarray:
    """Positions of one epoch's images, as many as there are labels; a function of its arguments.

    Args:
        labels: (n,) class indices.
        balance: see `CachedFeed`; with 0, a permutation.
    """
    rng = np.random.default_rng((seed, epoch))
    count = len(labels)
    if balance == 0.0:
        return rng.permutation(count)
    wanted = rng.choice(
        np.arange(labels.max() + 1), count, p=balanced_weights(np.bincount(labels), balance)
    )
    order = np.empty(count, dtype=np.int64)
    for label in np.unique(wanted):
        places = np.flatnonzero(wanted == label)
        # Whole shuffles of the class one after the other: no image is far ahead of the others.
        mine = np.flatnonzero(labels == label)
        rounds = [rng.permutation(mine) for _ in range(-(-len(places) // len(mine)))]
        order[places] = np.concatenate(rounds)[: len(places)]
    return order


class StreamedFeed:
    """Endless epochs of a stream too large for memory, through a shuffle buffer of our own.

    Args:
        epoch: gives the rows of one epoch, by its number.
        buffer: images the shuffle buffer holds.
        repeats: see `CachedFeed`.
    """

    def __init__(
        self,
        epoch: Callable[[int], Iterable[Row]],
        decoder: Decoder,
        *,
        batch_size: int,
        seed: int,
        buffer: int,
        repeats: int = 1,
    ) -> None:
        self.decoder, self.batch_size, self.seed = decoder, batch_size, seed
        shuffled = self._shuffled(epoch, np.random.default_rng(seed), max(buffer, batch_size))
        self._items = (item for item in shuffled for _ in range(repeats))

    def _shuffled(
        self, epoch: Callable[[int], Iterable[Row]], rng: np.random.Generator, buffer: int
    ) -> Iterator[Item]:
        held: list[Item] = []
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
                raise UserError("no image to train on could be decoded")
            # Not rng.shuffle, which would turn the items into rows of an array.
            yield from (held[at] for at in rng.permutation(len(held)))
            held, number = [], number + 1

    def batch(self, step: int) -> Batch:
        items = list(islice(self._items, self.batch_size))
        return self.decoder.batch(items, derived_seed(self.seed, step))

    def close(self) -> None:
        pass


class LiveFeed:
    """Synthetic images while they are being made: fresh ones first, then replays from a reservoir.

    A thread drains the stream. After `warmup` images `batch` never waits: when the generator is
    slow, images are drawn again, all classes equally often (a slow generator costs freshness, not GPU
    time). When it is fast, no image makes room for another before it was used once: a reservoir full
    of unused images holds the stream back.

    Args:
        stream: image rows, ended by exhaustion; rows not accepted are passed over.
        warmup: images to wait for before the first batch.
        capacity: images held, unused ones included; beyond it a used image makes room.
        memory_bytes: what is held in memory; the rest is spilled to a temporary file.

    Attributes:
        ended: all that the stream had has arrived.
    """

    def __init__(
        self,
        stream: Iterable[Row],
        decoder: Decoder,
        *,
        batch_size: int,
        warmup: int,
        capacity: int = CAPACITY,
        seed: int,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.decoder, self.batch_size, self.seed = decoder, batch_size, seed
        self.warmup = max(warmup, 1)
        # Less than a batch more than the warm-up, and a full reservoir could wait for its own user.
        self.capacity = max(capacity, self.warmup + batch_size)
        self.images = Reservoir(memory_bytes)
        self.fresh: deque[int] = deque()
        self.used: dict[int, list[int]] = {}  # by class
        self.arrived = self.fresh_drawn = self.replayed = self.num_used = 0
        self._rng = np.random.default_rng(seed)
        self._changed = threading.Condition()
        self.ended = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, args=(iter(stream),), daemon=True)
        self._thread.start()

    def _drain(self, stream: Iterator[Row]) -> None:
        try:
            for row in stream:
                item = self.decoder.keep(row) if row.get("accepted", True) else None
                with self._changed:
                    if item is not None and not self._closed:
                        self._changed.wait_for(self._make_room)
                    if self._closed:
                        return
                    if item is not None:
                        self.fresh.append(self.images.put(item))
                        self.arrived += 1
                        self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    def _make_room(self) -> bool:
        """Whether another image may come in; a used one of the fullest class goes for it."""
        if self._closed or len(self.images) < self.capacity:
            return True
        if not self.num_used:
            return False
        keys = max(self.used.values(), key=len)
        at = int(self._rng.integers(len(keys)))
        keys[at], keys[-1] = keys[-1], keys[at]
        self.images.drop(keys.pop())
        self.num_used -= 1
        return True

    def batch(self, step: int) -> Batch:
        with self._changed:
            self._changed.wait_for(
                lambda: self.arrived >= self.warmup or self.ended or self._closed
            )
            if self._error is not None:
                raise self._error
            if not self.arrived:
                raise UserError("no synthetic image was accepted: nothing to train on")
            keys = [self.fresh.popleft() for _ in range(min(self.batch_size, len(self.fresh)))]
            for key in keys:
                self.used.setdefault(self.images.label(key), []).append(key)
            self.num_used += len(keys)
            self.fresh_drawn += len(keys)
            keys += self._replays(self.batch_size - len(keys))
            items = [self.images.get(key) for key in keys]
            self._changed.notify_all()
        return self.decoder.batch(items, derived_seed(self.seed, step))

    def _replays(self, count: int) -> list[int]:
        classes = [keys for keys in self.used.values() if keys]
        self.replayed += count
        drawn = (classes[at] for at in self._rng.integers(len(classes), size=count))
        return [keys[int(self._rng.integers(len(keys)))] for keys in drawn]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self.images.close()


class LockstepFeed:
    """Every synthetic image fresh and in plan order; waits for each. Cycles once the plan is used.

    Args:
        stream: image rows of the whole plan, in order; those made before a restart come from the
            store, and are passed over up to `start_step`.
        memory_bytes: see `LiveFeed`.
    """

    def __init__(
        self,
        stream: Iterable[Row],
        decoder: Decoder,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.decoder, self.batch_size, self.seed = decoder, batch_size, seed
        self.images = Reservoir(memory_bytes)
        self._items = islice(self._in_order(stream), start_step * batch_size, None)

    def _in_order(self, stream: Iterable[Row]) -> Iterator[Item]:
        for row in stream:
            item = self.decoder.keep(row) if row.get("accepted", True) else None
            if item is not None:
                self.images.put(item)
                yield item
        if not self.images:
            raise UserError("no synthetic image was accepted: nothing to train on")
        while True:
            yield from (self.images.get(key) for key in range(len(self.images)))

    def batch(self, step: int) -> Batch:
        items = list(islice(self._items, self.batch_size))
        return self.decoder.batch(items, derived_seed(self.seed, step))

    def close(self) -> None:
        self.images.close()
