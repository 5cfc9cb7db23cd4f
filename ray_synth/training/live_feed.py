"""Feeds of synthetic images that are still being made; see `feed.py`."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from ray_synth.errors import UserError
from ray_synth.training.decoder import Decoder, Item, Row
from ray_synth.training.feed import Draw, derived_seed
from ray_synth.training.reservoir import Reservoir

CAPACITY = 20_000  # images that a live feed holds for replay
MEMORY_BYTES = 2 << 30


class LiveFeed:
    """Synthetic images while they are being made: fresh ones first, then replays of earlier ones.

    A thread drains the stream. After `warmup` images `draw` never waits: when the generator is
    slow, images are drawn again, all classes equally often (a slow generator costs freshness, not GPU
    time). When it is fast, no image makes room for another before it was used once: memory full
    of unused images holds the stream back.

    Once an image had to make room, replays come from all that was made so far: another thread reads
    them from the store, each once in a pass over it, and goes on after the end of the stream. Where
    the store is slower than training, images that are held are drawn once more: nothing waits.

    Args:
        stream: image rows, ended by exhaustion; rows not accepted are passed over.
        warmup: images to wait for before the first batch.
        capacity: images held, unused ones included; beyond it a used image makes room.
        memory_bytes: what is held in memory; without `replays` the rest of `capacity` is spilled to a
            temporary file.
        replays: rows of the store, endlessly; asked for when there is need of them. None: only images
            that are held are drawn again.
        shared: the store has images of other workers' streams as well, to be drawn after the end of
            this one.
        earlier: the store has images from before this stream; they are drawn from the first batch on,
            which no longer waits then.

    Attributes:
        ended: all that the stream had has arrived.
        first_after: seconds from the start to the first image; None before it.
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
        replays: Iterator[Row] | None = None,
        shared: bool = False,
        earlier: bool = False,
    ) -> None:
        self.decoder, self.batch_size, self.seed = decoder, batch_size, seed
        self.warmup = max(warmup, 1)
        # Less than a batch more than the warm-up, and a full reservoir could wait for its own user.
        self.capacity = max(capacity, self.warmup + batch_size)
        self.memory_bytes, self.replays = memory_bytes, replays
        self.shared, self.earlier = shared, earlier
        self.images = Reservoir(memory_bytes if replays is None else sys.maxsize)
        self.fresh: deque[int] = deque()
        self.again: list[int] = []  # read from the store, not drawn since
        self.used: dict[int, list[int]] = {}  # by class
        self._rest: dict[int, list[int]] = {}  # of `used`, not replayed in this pass
        self.arrived = self.fresh_drawn = self.replayed = self.num_used = self.dropped = 0
        self._rng = np.random.default_rng(seed)
        self._changed = threading.Condition()
        self.ended = self._closed = self._held_back = self._reading = self._passing_over = False
        self._started = time.monotonic()
        self.first_after: float | None = None
        self._error: BaseException | None = None
        self._start(self._drain, iter(stream))
        if earlier:
            self._ask_for_replays()

    def _start(self, work: Callable[[Iterator[Row]], None], rows: Iterator[Row]) -> None:
        threading.Thread(target=self._guarded, args=(work, rows), daemon=True).start()

    def _guarded(self, work: Callable[[Iterator[Row]], None], rows: Iterator[Row]) -> None:
        """Do a thread's work; an error of it ends the feed."""
        try:
            work(rows)
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self.ended = self.ended or work == self._drain
                self._changed.notify_all()

    def _drain(self, stream: Iterator[Row]) -> None:
        for row in stream:
            if self.first_after is None:
                self.first_after = time.monotonic() - self._started
            if self._passing_over:
                continue
            item = self.decoder.keep(row) if row.get("accepted", True) else None
            if item is None:
                continue
            with self._changed:
                self._changed.wait_for(self._room_for_fresh)
                if self._closed:
                    return
                if self._passing_over:
                    continue
                self.fresh.append(self.images.put(item))
                self.arrived += 1
                self._changed.notify_all()

    def _read_again(self, rows: Iterator[Row]) -> None:
        for row in rows:
            item = self.decoder.keep(row)
            if item is None:
                continue
            with self._changed:
                self._changed.wait_for(self._room_for_replays)
                if self._closed:
                    return
                self.again.append(self.images.put(item))
                self._changed.notify_all()

    def _room_for_fresh(self) -> bool:
        done = self._closed or self._passing_over
        self._held_back = not (done or self._make_room())
        if self._held_back:
            self._changed.notify_all()
        return not self._held_back

    def _room_for_replays(self) -> bool:
        # Half of what is held, or fresh images would have no room.
        most = max(self.batch_size, len(self.images) // 2)
        return self._closed or (len(self.again) < most and self._make_room())

    def _make_room(self) -> bool:
        """Whether another image may come in; used ones of the fullest class go for it."""
        while self._is_full():
            if not self.num_used:
                return False
            keys = max(self.used.values(), key=len)
            at = int(self._rng.integers(len(keys)))
            keys[at], keys[-1] = keys[-1], keys[at]
            self.images.drop(keys.pop())
            self.num_used -= 1
            self.dropped += 1
        return True

    def _is_full(self) -> bool:
        if len(self.images) >= self.capacity:
            return True
        # A batch is held in any case.
        fits = self.images.held_bytes < self.memory_bytes or len(self.images) < self.batch_size
        return self.replays is not None and not fits

    def _can_draw(self) -> bool:
        if self._closed or self._held_back or self._error is not None:
            return True
        if self.earlier:
            there = self.num_used > 0 or (self.ended and self.arrived > 0)
            return there or len(self.again) >= self.batch_size
        return self.ended or self.arrived >= self.warmup

    def draw(self, step: int) -> Draw:
        with self._changed:
            self._changed.wait_for(self._can_draw)
            if self._error is not None:
                raise self._error
            if not (self.arrived or self.again or self.num_used):
                raise UserError("no synthetic image was accepted: nothing to train on")
            keys = [self.fresh.popleft() for _ in range(min(self.batch_size, len(self.fresh)))]
            self.fresh_drawn += len(keys)
            self.replayed += self.batch_size - len(keys)
            for _ in range(min(self.batch_size - len(keys), len(self.again))):
                at = int(self._rng.integers(len(self.again)))
                self.again[at], self.again[-1] = self.again[-1], self.again[at]
                keys.append(self.again.pop())
            for key in keys:
                self.used.setdefault(self.images.label(key), []).append(key)
            self.num_used += len(keys)
            keys += self._held_again(self.batch_size - len(keys))
            items = [self.images.get(key) for key in keys]
            self._changed.notify_all()
        self._ask_for_replays()
        return Draw(items, derived_seed(self.seed, step))

    def _held_again(self, count: int) -> list[int]:
        """Used images: classes equally often, and of a class all before one comes again."""
        labels = [label for label, keys in self.used.items() if keys]
        found = []
        for at in self._rng.integers(len(labels), size=count).tolist():
            rest = self._rest.setdefault(labels[at], [])
            key = rest.pop() if rest else -1
            while key not in self.images:  # dropped since, or the pass is over
                if not rest:
                    rest.extend(self._rng.permutation(self.used[labels[at]]).tolist())
                key = rest.pop()
            found.append(key)
        return found

    def _ask_for_replays(self) -> None:
        if self.replays is None or self._reading:
            return
        if self.dropped or self.earlier or (self.ended and self.shared):
            self._reading = True
            self._start(self._read_again, self.replays)

    def finish(self, seconds: float | None = None) -> bool:
        """Let the stream go on to its end, its images passed over: what makes them is at work already.

        What goes wrong with the stream from here on is no error of the feed; it ends.

        Args:
            seconds: how long to wait for it at most; None: to its end.

        Returns:
            Whether the stream has ended.
        """
        with self._changed:
            self._passing_over = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self.ended or self._closed, seconds)

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
