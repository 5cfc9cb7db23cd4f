"""The plan as it is kept: its columns, and its rows by position, from memory or from a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ray_synth.storage.folder import Folder

PLAN_FILE = "plan.parquet"
WINDOW = 8_192  # plan rows that a reader keeps
PLAN_FIELDS = [
    pa.field("sample_id", pa.string()),
    pa.field("class_index", pa.int64()),
    pa.field("class_name", pa.string()),
    pa.field("meaning", pa.string()),
    pa.field("kind", pa.string()),
    pa.field("style", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("negative_prompt", pa.string()),
    pa.field("context_source", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("reference", pa.string()),
]
PLAN_SCHEMA = pa.schema(PLAN_FIELDS)


class Plan(Protocol):
    """Plan rows by position; cheap to send to an actor."""

    def __len__(self) -> int: ...

    def ids(self, size: int) -> Iterator[list[str]]:
        """The sample ids in order, `size` at a time."""
        ...

    def ids_of(self, start: int, stop: int) -> list[str]:
        """The sample ids of rows `start` to `stop`."""
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

    def ids_of(self, start: int, stop: int) -> list[str]:
        return self.table["sample_id"].slice(start, stop - start).to_pylist()

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        return self.table.slice(start, stop - start).to_pylist()


class PlanFile:
    """A plan of any length in a Parquet file; never read whole."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._start, self._window = 0, pa.table({})

    def __reduce__(self) -> tuple[type[PlanFile], tuple[Folder]]:
        return PlanFile, (self.folder,)

    def __len__(self) -> int:
        with self.folder.filesystem.open_input_file(self.folder.path(PLAN_FILE)) as file:
            return pq.read_metadata(file).num_rows

    def ids(self, size: int) -> Iterator[list[str]]:
        with self.folder.filesystem.open_input_file(self.folder.path(PLAN_FILE)) as file:
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

    def ids_of(self, start: int, stop: int) -> list[str]:
        table = self.folder.read_rows(PLAN_FILE, start, stop, ["sample_id"])
        return table["sample_id"].to_pylist()

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        first = start - self._start
        if first < 0 or stop - self._start > self._window.num_rows:
            self._start, first = start, 0
            self._window = self.folder.read_rows(PLAN_FILE, start, max(stop, start + WINDOW))
        return self._window.slice(first, stop - start).to_pylist()
