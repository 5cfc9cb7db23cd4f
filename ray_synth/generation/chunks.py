"""A plan cut into chunks of one generator batch each, and which of them the store lacks. No Ray.

Chunks lie at fixed places of the plan, so that whoever makes a chunk, and however often, writes the same
part. A finished chunk is known by its part's name alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ray_synth.generation.store import ImageStore, part_name
from ray_synth.storage.folder import Folder

WINDOW = 8_192  # plan rows that a reader keeps


class Plan(Protocol):
    """Plan rows by position; cheap to send to an actor."""

    def __len__(self) -> int: ...

    def ids(self, size: int) -> Iterator[list[str]]:
        """The sample ids in order, `size` at a time."""
        ...

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]: ...


class PlanTable:
    """A plan in memory."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def ids(self, size: int) -> Iterator[list[str]]:
        for start in range(0, len(self), size):
            yield self.table["sample_id"].slice(start, size).to_pylist()

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        return self.table.slice(start, stop - start).to_pylist()


class PlanFile:
    """A plan of any length in a Parquet file; never read whole."""

    def __init__(self, folder: Folder, name: str = "plan.parquet") -> None:
        self.folder, self.name = folder, name
        self._start, self._window = 0, pa.table({})

    def __reduce__(self) -> tuple[type[PlanFile], tuple[Folder, str]]:
        return PlanFile, (self.folder, self.name)

    def __len__(self) -> int:
        with self.folder.filesystem.open_input_file(self.folder.path(self.name)) as file:
            return pq.read_metadata(file).num_rows

    def ids(self, size: int) -> Iterator[list[str]]:
        with self.folder.filesystem.open_input_file(self.folder.path(self.name)) as file:
            batches = pq.ParquetFile(file).iter_batches(max(size, WINDOW), columns=["sample_id"])
            left: list[str] = []
            for batch in batches:
                left += batch["sample_id"].to_pylist()
                whole = len(left) // size * size
                for at in range(0, whole, size):
                    yield left[at : at + size]
                left = left[whole:]
        if left:
            yield left

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        first = start - self._start
        if first < 0 or stop - self._start > self._window.num_rows:
            self._start, first = start, 0
            self._window = self.folder.read_rows(self.name, start, max(stop, start + WINDOW))
        return self._window.slice(first, stop - start).to_pylist()


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of a plan; `parts` of the store hold all, some or none of them."""

    start: int
    stop: int
    parts: tuple[str, ...]
    missing: int


def cut(plan: Plan, store: ImageStore, batch_size: int) -> list[Chunk]:
    """All chunks of a plan, with what the store has of them.

    The store is listed once. Files are opened only where parts are no chunk of this plan: they were
    made with another batch size, or for an earlier plan, and their rows are looked up by id.
    """
    listed = set(store.parts())
    names = [part_name(ids) for ids in plan.ids(batch_size)]
    others = listed.difference(names)
    elsewhere = store.locate(others) if others else {}
    ids_of = plan.ids(batch_size) if elsewhere else repeat([])
    rows, chunks = len(plan), []
    for number, (name, ids) in enumerate(zip(names, ids_of, strict=False)):
        start = number * batch_size
        stop = min(start + batch_size, rows)
        if name in listed:
            chunks.append(Chunk(start, stop, (name,), 0))
        else:
            found = [elsewhere[i] for i in ids if i in elsewhere]
            chunks.append(Chunk(start, stop, tuple(sorted(set(found))), stop - start - len(found)))
    return chunks


def missing_rows(chunks: list[Chunk]) -> int:
    return sum(chunk.missing for chunk in chunks)
