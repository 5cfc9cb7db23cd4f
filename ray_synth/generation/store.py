"""The image store: append-only Parquet parts, one per generator batch. What is listed is what exists.

A part is named by the ids of its rows: a batch made twice (a task retried after its actor died)
replaces itself, and which batches of a plan are done is known from the listing, without opening a file.
A part appears under its name only when it is whole. Earlier attempts of rows that were made again with
a new seed are kept beside, in `rejected/`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.prompting.plan_file import PLAN_FIELDS
from ray_synth.storage.folder import Folder

READ_AHEAD = 16  # parts
IMAGE_SCHEMA = pa.schema(
    [
        *PLAN_FIELDS,
        pa.field("image", pa.binary()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("clip_score", pa.float64()),
        pa.field("embedding", pa.list_(pa.float16())),
        pa.field("accepted", pa.bool_()),
        pa.field("reject_reason", pa.string()),
        pa.field("attempt", pa.int64()),
        pa.field("generator", pa.string()),
        pa.field("gpu_seconds", pa.float64()),
    ]
)


class ImageStore:
    """The `images/` folder of a run."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    @property
    def rejected(self) -> ImageStore:
        """Earlier attempts of rows whose images were rejected and made again."""
        return ImageStore(self.folder.child("rejected"))

    def parts(self) -> list[str]:
        """Names of the finished parts, sorted."""
        return [name for name in self.folder.names(".parquet") if name.startswith("part-")]

    def holds(self, name: str) -> bool:
        return self.folder.exists(name)

    def write(self, rows: list[dict[str, Any]]) -> str:
        """Write one batch as a part; its name."""
        name = part_name([row["sample_id"] for row in rows])
        self.folder.write_table(name, pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA))
        return name

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return self.folder.read_table(name, columns)

    def clear(self) -> None:
        """Delete every part."""
        for store in (self, self.rejected):
            for name in store.parts():
                store.folder.delete(name)

    def locate(self, parts: Iterable[str] | None = None) -> dict[str, str]:
        """sample_id -> part, read from the parts given, or from all."""
        names = sorted(self.parts() if parts is None else parts)
        found: dict[str, str] = {}
        for name, table in self.tables(names, ["sample_id"]):
            found.update(dict.fromkeys(table["sample_id"].to_pylist(), name))
        return found

    def rows(self, plan: pa.Table, columns: list[str]) -> Iterator[dict[str, Any]]:
        """The made rows of a plan, each once, part by part, parts in the order of their names."""
        seen: set[str] = set()
        for table in self._planned(plan["sample_id"], columns):
            for row in table.to_pylist():
                if row["sample_id"] not in seen:
                    seen.add(row["sample_id"])
                    yield row

    def table(self, sample_ids: pa.ChunkedArray, columns: list[str]) -> pa.Table:
        """Columns of the made rows of a plan, each once and in its order; for small columns."""
        schema = pa.schema([IMAGE_SCHEMA.field(name) for name in ("sample_id", *columns)])
        whole = pa.concat_tables([schema.empty_table(), *self._planned(sample_ids, columns)])
        rank = pc.index_in(whole["sample_id"], value_set=sample_ids.combine_chunks())
        _, first = np.unique(rank.to_numpy(), return_index=True)
        return whole.take(first)

    def _planned(self, ids: pa.ChunkedArray, columns: list[str]) -> Iterator[pa.Table]:
        value_set = pa.chunked_array(ids.chunks, type=pa.string()).combine_chunks()
        wanted = list(dict.fromkeys(["sample_id", *columns]))
        for _, table in self.tables(self.parts(), wanted):
            mask = pc.is_in(table["sample_id"], value_set=value_set)
            yield table if pc.all(mask).as_py() else table.filter(mask)

    def tables(self, names: list[str], columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
        """(name, table) of parts in the order given, a few read ahead."""
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            for at in range(0, len(names), READ_AHEAD):
                some = names[at : at + READ_AHEAD]
                yield from zip(
                    some, pool.map(lambda name: self.read(name, columns), some), strict=True
                )


def part_name(sample_ids: list[str]) -> str:
    """The name of the part that holds these rows."""
    digest = hashlib.sha256("\n".join(sample_ids).encode()).hexdigest()[:16]
    return f"part-{digest}.parquet"
