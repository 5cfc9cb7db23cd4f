"""The plan as it is kept: its columns, and its rows by position, from memory or from a Parquet file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_synth.storage.damage import DamagedFile, damaged
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
# What every version's rows have, and what their values are.
NEEDED = ("sample_id", "class_index", "class_name", "prompt", "seed")
SAMPLE_ID = re.compile(r"^[A-Za-z0-9_-]{1,64}$")
MOST_SEED, MOST_CLASSES = 2**48, 2**24


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
        with self._open() as file:
            return file.metadata.num_rows

    def ids(self, size: int) -> Iterator[list[str]]:
        with self._open() as file:
            left: list[str] = []
            for batch in file.iter_batches(max(size, WINDOW), columns=["sample_id"]):
                self._check_ids(batch["sample_id"])
                left += batch["sample_id"].to_pylist()
                whole = len(left) // size * size
                for at in range(0, whole, size):
                    yield left[at : at + size]
                left = left[whole:]
        if left:
            yield left

    def ids_of(self, start: int, stop: int) -> list[str]:
        table = self._read(start, stop, ["sample_id"])
        self._check_ids(table["sample_id"])
        return table["sample_id"].to_pylist()

    def rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        first = start - self._start
        if first < 0 or stop - self._start > self._window.num_rows:
            window = self._read(start, max(stop, start + WINDOW))
            self._check_rows(window, start)
            self._start, first, self._window = start, 0, window
        return self._window.slice(first, stop - start).to_pylist()

    def columns(self, names: list[str]) -> pa.Table:
        """Small columns of all rows, checked as rows are."""
        table = self._read(0, len(self), names)
        self._check_values(table, 0)
        return table

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        """The file, whose columns are a plan's.

        Raises:
            DamagedFile: it is not, or cannot be read.
        """
        try:
            with self.folder.open_table(PLAN_FILE) as file:
                self._check_columns(file.schema_arrow)
                yield file
        except FileNotFoundError:
            raise self._damaged("it is gone") from None

    def _read(self, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        try:
            return self.folder.read_rows(PLAN_FILE, start, stop, columns)
        except FileNotFoundError:
            raise self._damaged("it is gone") from None

    def _damaged(self, why: str) -> DamagedFile:
        return damaged(self.folder.address(PLAN_FILE), why)

    def _check_columns(self, schema: pa.Schema) -> None:
        for name in NEEDED:
            at, wanted = schema.get_field_index(name), PLAN_SCHEMA.field(name).type
            if at < 0 or schema.field(at).type != wanted:
                raise self._damaged(f"it has no column {name!r} of type {wanted}")

    def _check_ids(self, ids: pa.ChunkedArray | pa.Array) -> None:
        """An id names a file and a row: letters and digits, as all that a plan is written with."""
        fits = pc.fill_null(pc.match_substring_regex(ids, SAMPLE_ID.pattern), False)
        if not pc.all(fits, min_count=0).as_py():
            wrong = ids.filter(pc.invert(fits))[0].as_py()
            raise self._damaged(f"sample_id {wrong!r:.80} cannot name a file")

    def _check_rows(self, table: pa.Table, start: int) -> None:
        self._check_columns(table.schema)
        self._check_ids(table["sample_id"])
        self._check_values(table, start)

    def _check_values(self, table: pa.Table, start: int) -> None:
        for name in set(NEEDED) & set(table.column_names):
            if table[name].null_count:
                at = int(np.flatnonzero(table[name].is_null().to_numpy())[0])
                raise self._damaged(f"row {start + at} has no {name}")
        for name, most in (("seed", MOST_SEED), ("class_index", MOST_CLASSES)):
            if name not in table.column_names:
                continue
            values = table[name].to_numpy()
            wrong = np.flatnonzero((values < 0) | (values >= most))
            if len(wrong):
                at = int(wrong[0])
                raise self._damaged(f"row {start + at} has the {name} {values[at]}")
