"""Where each row of a plan lies in a finished store, and whether it is accepted: a bit and a few runs.

A job carries it by value: eight million rows in packs take about a megabyte.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_synth.errors import UserError
from ray_synth.generation.chunks import Holdings
from ray_synth.generation.store import ImageStore

READERS = 32  # footers that are read at once


@dataclass(frozen=True, eq=False)
class StoredRows:
    """The first rows of a plan in a store.

    Attributes:
        store: where they lie.
        names: of the parts.
        runs: (runs, 3) int64: a row of the plan, the place of its part in `names`, and its row there;
            those that follow it up to the next run follow there as well.
        accepted: (rows / 8,) uint8: a bit per row (`numpy.packbits`).
        rows: how many there are.
        block: rows of the plan that are best read at once: a row group of a pack.
    """

    store: ImageStore
    names: tuple[str, ...]
    runs: np.ndarray
    accepted: np.ndarray
    rows: int
    block: int

    @classmethod
    def of(cls, held: Holdings, store: ImageStore, num_rows: int, block: int) -> StoredRows:
        """Of what was looked up; footers, or the flags of small parts, say what is accepted.

        Raises:
            UserError: some of the rows were not made.
        """
        part, row = held.part[:num_rows], held.row[:num_rows]
        lacking = int((part < 0).sum())
        if lacking:
            raise UserError(
                f"{lacking} of {num_rows} images are not in {store.folder.address()}: run "
                "`ray-synth generate`"
            )
        accepted = np.zeros(len(part), bool)
        order = np.argsort(part, kind="stable")
        edges = np.searchsorted(part[order], np.arange(len(held.names) + 1))
        used = [at for at in range(len(held.names)) if edges[at] < edges[at + 1]]
        with ThreadPoolExecutor(READERS) as pool:
            flags = pool.map(lambda at: store.accepted(held.names[at]), used)
            for at, flag in zip(used, flags, strict=True):
                mine = order[edges[at] : edges[at + 1]]
                accepted[mine] = flag[row[mine]]
        jumps = (np.diff(part) != 0) | (np.diff(row) != 1)
        first = np.concatenate([[0], np.flatnonzero(jumps) + 1])[: len(part)]
        runs = np.stack([first, part[first], row[first]], axis=1).astype(np.int64)
        return cls(store, tuple(held.names), runs, np.packbits(accepted), len(part), block)

    def counts(self, block: int) -> np.ndarray:
        """Accepted rows of each block of so many rows, (blocks,) int64."""
        flags = np.unpackbits(self.accepted, count=self.rows)
        padded = np.pad(flags, (0, -self.rows % block))
        return padded.reshape(-1, block).sum(axis=1, dtype=np.int64)

    def read(self, start: int, stop: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        """The accepted ones of rows `start` to `stop`, in the order of the plan."""
        first = int(np.searchsorted(self.runs[:, 0], start, side="right")) - 1
        for begin, part, row in self.runs[first:].tolist():
            if begin >= stop:
                return
            at = first + 1
            end = int(self.runs[at, 0]) if at < len(self.runs) else self.rows
            first = at
            low, high = max(begin, start), min(end, stop)
            table = self.store.read_rows(
                self.names[part], row + low - begin, row + high - begin, columns
            )
            flags = np.unpackbits(self.accepted[low // 8 : high // 8 + 1])[low % 8 :]
            for found, flag in zip(table.to_pylist(), flags.tolist(), strict=False):
                if flag:
                    yield found
