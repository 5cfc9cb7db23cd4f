"""Which images a training worker learns from at each step: one feed per domain.

Rows `{image: encoded bytes, class_index}` in; a `Draw` of items per step out, which the decoder makes
pixels of. `draw` is called in the prefetcher's thread, never in the training thread.

    CachedFeed    rows in memory, reshuffled each epoch: small real sets, finished small stores
    StreamedFeed  an endless stream of epochs through a shuffle buffer: large sets
    LiveFeed      images that are still being made: fresh ones first, then replays; never waits
    LockstepFeed  images that are still being made: each used in order; waits for them

The last two are in `live_feed.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from ray_synth.errors import UserError
from ray_synth.training.decoder import Decoder, Item, Row
from ray_synth.training.recipe import balanced_weights


class Draw(NamedTuple):
    """The images of one batch; `seed` decides their random crops and colours."""

    items: list[Item]
    seed: int


class Feed(Protocol):
    """A source of batches; `step` is the number of the batch."""

    def draw(self, step: int) -> Draw: ...

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

    def draw(self, step: int) -> Draw:
        first = (step * self.world_size + self.rank) * self.batch_size
        items = []
        for number in range(first, first + self.batch_size):
            epoch, at = divmod(number // self.repeats, len(self.items))
            items.append(self.items[self._order(epoch)[at]])
        return Draw(items, derived_seed(self.seed, step, self.rank))

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

    def draw(self, step: int) -> Draw:
        items = list(islice(self._items, self.batch_size))
        return Draw(items, derived_seed(self.seed, step))

    def close(self) -> None:
        pass
