"""The image store: append-only Parquet parts, one a generator batch. What is listed is what exists.

A part is named by the ids of its rows, so that a batch made twice (a task retried after its actor
died) replaces itself; it appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from ray_synth.storage import Folder

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

    def parts(self) -> list[str]:
        return [name for name in self.folder.names(".parquet") if name.startswith("part-")]

    def write(self, rows: list[dict[str, Any]]) -> str:
        """Write one batch as a part; its name."""
        name = part_name([row["sample_id"] for row in rows])
        self.folder.write_table(name, pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA))
        return name

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return self.folder.read_table(name, columns)

    def locate(self, known: dict[str, str] | None = None) -> dict[str, str]:
        """sample_id -> part, over all parts; with `known`, only parts it lacks are read."""
        found = dict(known or {})
        new = sorted(set(self.parts()) - set(found.values()))
        with ThreadPoolExecutor(16) as pool:
            for name, table in zip(
                new, pool.map(lambda n: self.read(n, ["sample_id"]), new), strict=True
            ):
                found.update(dict.fromkeys(table["sample_id"].to_pylist(), name))
        return found

    def missing(self, plan: pa.Table) -> pa.Table:
        """The plan rows that no part holds, in plan order (an anti-join on sample_id)."""
        made = self.locate()
        mask = [sample_id not in made for sample_id in plan["sample_id"].to_pylist()]
        return plan.filter(pa.array(mask, pa.bool_()))

    def rows(self, plan: pa.Table, columns: list[str]) -> Iterator[dict[str, Any]]:
        """The made rows of a plan, each once, part by part."""
        wanted = set(plan["sample_id"].to_pylist())
        for name in self.parts():
            table = self.read(name, sorted({"sample_id", *columns}))
            for row in table.to_pylist():
                if row["sample_id"] in wanted:
                    wanted.remove(row["sample_id"])
                    yield row


def part_name(sample_ids: list[str]) -> str:
    """The name of the part that holds these rows."""
    digest = hashlib.sha256("\n".join(sample_ids).encode()).hexdigest()[:16]
    return f"part-{digest}.parquet"
