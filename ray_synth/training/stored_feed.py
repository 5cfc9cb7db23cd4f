"""The feed of a finished store that memory does not hold; see `feed.py`.

What is read in which order is a function of (seed, epoch, rank) alone. An epoch's blocks of plan rows (a
block is a row group of a pack) are shuffled and dealt out to the ranks; a window of them is open at a
time, and its images are shuffled. The plan mixes all classes, so each block does.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice

import numpy as np

from ray_synth.errors import UserError
from ray_synth.generation.stored import StoredRows
from ray_synth.training.decoder import Decoder, Item, Row
from ray_synth.training.feed import Draw, derived_seed

OPEN_BLOCKS = 16  # of a window; the next window is read beside it
COLUMNS = ["sample_id", "image", "class_index"]


class StoredFeed:
    """Endless epochs over a store, a part of each for this rank.

    Batch `step` is a function of (seed, rank, world_size, step) alone: to resume, blocks that were
    passed are skipped by their counts of accepted rows, and not read. Holds two windows of encoded
    images.

    Raises:
        UserError: no image of this rank's is accepted.
    """

    def __init__(
        self,
        rows: StoredRows,
        decoder: Decoder,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        self.rows, self.decoder, self.batch_size, self.seed = rows, decoder, batch_size, seed
        self.rank, self.world_size = rank, world_size
        # Of few rows, blocks so small that each rank has several.
        self.block = max(1, min(rows.block, rows.rows // (4 * world_size)))
        self.counts = rows.counts(self.block)
        self._pool = ThreadPoolExecutor(OPEN_BLOCKS, thread_name_prefix="stored-feed")
        self._items = self._from(start_step * batch_size)

    def blocks(self, epoch: int) -> np.ndarray:
        """Numbers of this rank's blocks of an epoch, in order."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.counts))
        return order[self.rank :: self.world_size]

    def _from(self, skip: int) -> Iterator[Item]:
        """Images of all epochs, without the first ones."""
        last: Item | None = None
        for rows, order in self._windows(skip):
            for at in order:
                # A corrupt image's place is taken by the one before it.
                last = self.decoder.keep(rows[at]) or last
                if last is not None:
                    yield last

    def _windows(self, skip: int) -> Iterator[tuple[list[Row], list[int]]]:
        """Each window's rows and the order in which they are drawn; the next one is being read."""
        ahead: tuple[list[Future[list[Row]]], np.ndarray] | None = None
        for blocks, order in self._plan(skip):
            reading = [self._pool.submit(self._read, int(block)) for block in blocks]
            if ahead is not None:
                yield [row for part in ahead[0] for row in part.result()], ahead[1].tolist()
            ahead = (reading, order)

    def _plan(self, skip: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of each window, and the order of its accepted rows; whole ones are skipped."""
        for epoch in count():
            blocks = self.blocks(epoch)
            held = int(self.counts[blocks].sum())
            if not held:
                raise UserError("no synthetic image was accepted: nothing to train on")
            if skip >= held:
                skip -= held
                continue
            for number, at in enumerate(range(0, len(blocks), OPEN_BLOCKS)):
                window = blocks[at : at + OPEN_BLOCKS]
                size = int(self.counts[window].sum())
                if skip >= size:
                    skip -= size
                    continue
                rng = np.random.default_rng((self.seed, epoch, self.rank, number))
                yield window, rng.permutation(size)[skip:]
                skip = 0

    def _read(self, block: int) -> list[Row]:
        start = block * self.block
        return list(self.rows.read(start, min(start + self.block, self.rows.rows), COLUMNS))

    def draw(self, step: int) -> Draw:
        items = list(islice(self._items, self.batch_size))
        return Draw(items, derived_seed(self.seed, step, self.rank))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
