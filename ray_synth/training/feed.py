"""Which images a training worker learns from at each step: one feed per domain.

Rows `{image: encoded bytes, class_index}` in; a `Draw` of items per step out, which the decoder makes
pixels of. `draw` is called in the prefetcher's thread, never in the training thread.

    ShuffledFeed  images of a known set, reshuffled each epoch; only those that are drawn are read
    CachedFeed    the same, of rows in memory: small real sets, finished small stores
    StoredFeed    a finished store that memory does not hold
    LiveFeed      images that are still being made: fresh ones first, then replays; never waits
    LockstepFeed  images that are still being made: each used in order; waits for them

The last three are in `stored_feed.py` and `live_feed.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from ray_synth.data.dataset import Index
from ray_synth.data.places import Place
from ray_synth.errors import UserError
from ray_synth.training.decoder import Decoder, Draw, Item, Row
from ray_synth.training.recipe import balanced_weights


class Feed(Protocol):
    """A source of batches; `step` is the number of the batch."""

    def draw(self, step: int) -> Draw: ...

    def close(self) -> None: ...


def derived_seed(*numbers: int) -> int:
    """A seed below 2^63 for each tuple of non-negative numbers, unrelated for neighbouring ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Images(Protocol):
    """A set of known size; `labels` is (n,) int64."""

    labels: np.ndarray

    def __getitem__(self, at: int) -> Item: ...


class HeldImages:
    """Rows in memory, in the form that the decoder keeps them in.

    Raises:
        UserError: none of them could be decoded.
    """

    def __init__(self, rows: Iterable[Row], decoder: Decoder) -> None:
        self.items = decoder.keep_all(rows)
        if not self.items:
            raise UserError("no image to train on could be decoded")
        self.labels = np.array([item.label for item in self.items])

    def __getitem__(self, at: int) -> Item:
        return self.items[at]


class IndexedImages:
    """Images of an index as the places that they are read from, when and where they are decoded."""

    def __init__(self, index: Index) -> None:
        self.index, self.labels = index, index.label

    def __getitem__(self, at: int) -> Item:
        index = self.index
        place = index.locate(at)
        if isinstance(place, Place) and place.size < 0:  # a whole file: its path is its id
            return Item(place, int(index.label[at]), place.path)
        return Item(place, int(index.label[at]), index.image_id(at))


class ShuffledFeed:
    """Images of a known set. Batch `step` is a function of (seed, step) alone: resuming needs no state.

    The epochs' orders are laid end to end and cut into global batches; of each, rank r of w takes every
    w-th image from its r-th on.

    Args:
        balance: 0 draws each image once per epoch; 1 draws all classes equally often, so that images
            of rare classes come several times and of frequent ones not in every epoch.
        repeats: each image is drawn this many times in a row, augmented differently each time, and so
            on as many ranks where there are so many (repeated augmentation, arXiv 1901.09335, as timm's
            RepeatAugSampler deals them out). An epoch of the order then takes as many times the steps.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        balance: float = 0.0,
        repeats: int = 1,
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size, self.repeats = rank, world_size, repeats
        labels = images.labels
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(labels, seed, epoch, balance))

    def places(self, step: int) -> list[int]:
        """Which images are drawn: positions in the set."""
        count = self.batch_size * self.world_size
        found = []
        for number in range(step * count + self.rank, (step + 1) * count, self.world_size):
            epoch, at = divmod(number // self.repeats, len(self.images.labels))
            found.append(int(self._order(epoch)[at]))
        return found

    def draw(self, step: int) -> Draw:
        items = [self.images[at] for at in self.places(step)]
        return Draw(items, derived_seed(self.seed, step, self.rank))

    def close(self) -> None:
        pass


class CachedFeed(ShuffledFeed):
    """Rows in memory, shuffled; options as of `ShuffledFeed`."""

    def __init__(self, rows: Iterable[Row], decoder: Decoder, **options: Any) -> None:
        super().__init__(HeldImages(rows, decoder), **options)
        self.decoder = decoder


def epoch_order(labels: np.ndarray, seed: int, epoch: int, balance: float = 0.0) -> np.ndarray:
    """Positions of one epoch's images, as many as there are labels; a function of its arguments.

    Args:
        labels: (n,) class indices.
        balance: see `ShuffledFeed`; with 0, a permutation.
    """
    rng = np.random.default_rng((seed, epoch))
    count = len(labels)
    if balance == 0.0:
        return rng.permutation(count)
    counts = np.bincount(labels)
    wanted = rng.choice(len(counts), count, p=balanced_weights(counts, balance))
    order = np.empty(count, dtype=np.int64)
    images, places = _by_class(labels, len(counts)), _by_class(wanted, len(counts))
    for label in np.unique(wanted):
        mine, to_fill = images[label], places[label]
        # Whole shuffles of the class one after the other: no image is far ahead of the others.
        rounds = [rng.permutation(mine) for _ in range(-(-len(to_fill) // len(mine)))]
        order[to_fill] = np.concatenate(rounds)[: len(to_fill)]
    return order


def _by_class(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """For each class, the positions that have it, in increasing order."""
    ends = np.cumsum(np.bincount(labels, minlength=classes))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])
