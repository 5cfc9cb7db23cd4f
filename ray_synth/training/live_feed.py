"""Feeds of synthetic images that are still being made; see `feed.py`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from ray_synth.errors import UserError
from ray_synth.training.decoder import Decoder, Item, Row
from ray_synth.training.feed import Draw, derived_seed
from ray_synth.training.reservoir import Reservoir

CAPACITY = 20_000  # images that a live feed holds for replay
MEMORY_BYTES = 2 << 30


class LiveFeed:
    """Synthetic images while they are being made: fresh ones first, then replays from a reservoir.

    A thread drains the stream. After `warmup` images `draw` never waits: when the generator is
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

    def draw(self, step: int) -> Draw:
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
        return Draw(items, derived_seed(self.seed, step))

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

    def draw(self, step: int) -> Draw:
        items = list(islice(self._items, self.batch_size))
        return Draw(items, derived_seed(self.seed, step))

    def close(self) -> None:
        self.images.close()
