"""The image store: append-only Parquet parts. What is listed is what exists.

A maker writes one part per generator batch, soon after it was made. It is named by the ids of its rows: a
batch made twice (a task retried after its actor died) replaces itself, and which batches of a plan are
done is known from the listing, without opening a file. Later, whole ranges of the plan are packed into
large parts, whose names say the range as well (`packs.py`); the small ones are deleted after that.
A part appears under its name only when it is whole; what is damaged later is found when the store is
listed for a stage (`checking.py`), or by the checksums of its pages. Earlier attempts of rows that were
made again with a new seed are kept beside, in `rejected/`.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_synth.prompting.plan_file import PLAN_FIELDS
from ray_synth.prompting.plan_index import PlanIndex
from ray_synth.storage.damage import DamagedFile
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
LATE_LISTINGS = 40  # a mounted folder may show a deleted file for a minute
PACK = re.compile(r"part-[0-9a-f]{16}-(\d+)-(\d+)\.parquet")
DAMAGED = "damaged"  # the folder of parts that are set aside
SUSPECT = (
    ".suspect"  # there: of a part that a reader found damaged; it is read whole by the next stage
)
REJECTED = b"rejected"  # in a pack's footer: numbers of its rows that are not accepted


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

    def suspected(self) -> list[str]:
        """Parts that a reader found damaged since they were looked at."""
        names = self.folder.child(DAMAGED).names(SUSPECT)
        return [name.removesuffix(SUSPECT) for name in names]

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        """A block that reads a part. Whoever finds it damaged notes that, if they may write there."""
        try:
            yield
        except DamagedFile:
            self.suspect(name)
            raise

    def suspect(self, name: str) -> None:
        """Have the next stage read a part whole, if this process may write there."""
        with suppress(OSError):
            self.folder.write_bytes(f"{DAMAGED}/{name}{SUSPECT}", b"")

    def set_aside(self) -> list[str]:
        """Damaged parts that were moved away, to be looked at or deleted by hand."""
        return [name for name in self.folder.child(DAMAGED).names() if not name.endswith(SUSPECT)]

    def write(self, rows: list[dict[str, Any]]) -> str:
        """Write one batch as a part; its name."""
        name = part_name([row["sample_id"] for row in rows])
        self.folder.write_table(name, pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA))
        return name

    def write_pack(self, name: str, groups: Iterable[pa.Table]) -> None:
        """Write a large part of one row group per table, whole or not at all."""
        rejected: list[int] = []
        rows = 0
        with (
            self.folder.stream(name) as sink,
            # Without statistics, footers are small; encoded images do not get smaller.
            pq.ParquetWriter(
                sink,
                IMAGE_SCHEMA,
                compression={n: "none" if n == "image" else "zstd" for n in IMAGE_SCHEMA.names},
                write_statistics=False,
                write_page_checksum=True,
            ) as writer,
        ):
            for table in groups:
                accepted = table["accepted"].to_numpy()
                rejected += (rows + np.flatnonzero(~accepted)).tolist()
                rows += table.num_rows
                writer.write_table(table, row_group_size=table.num_rows)
            writer.add_key_value_metadata({REJECTED: json.dumps(rejected).encode()})

    def accepted(self, name: str) -> np.ndarray:
        """Which rows of a part are accepted, (rows,) bool: of a pack, its footer says so."""
        if pack_range(name) is not None:
            with self._open(name) as file:
                metadata = file.metadata
                found = np.ones(metadata.num_rows, bool)
                found[json.loads(metadata.metadata[REJECTED])] = False
                return found
        return self.read(name, ["accepted"])["accepted"].to_numpy()

    def group_sizes(self, name: str) -> list[int]:
        """Rows of each row group of a part."""
        with self._open(name) as file:
            metadata = file.metadata
            return [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Raises DamagedFile, which names it, or FileNotFoundError; so do all that read parts."""
        with self._noted(name):
            return self.folder.read_table(name, columns)

    def read_rows(
        self, name: str, start: int, stop: int, columns: list[str] | None = None
    ) -> pa.Table:
        """Rows `start` to `stop` of a part."""
        with self._noted(name):
            return self.folder.read_rows(name, start, stop, columns)

    def clear(self) -> None:
        """Delete every part."""
        for store in (self, self.rejected):
            store.delete(store.parts())

    def delete(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            list(pool.map(self.folder.delete, names))

    def locate(self, parts: Iterable[str] | None = None) -> dict[str, str]:
        """sample_id -> part, read from the parts given, or from all."""
        names = sorted(self.parts() if parts is None else parts)
        found: dict[str, str] = {}
        for name, table in self.tables(names, ["sample_id"]):
            found.update(dict.fromkeys(table["sample_id"].to_pylist(), name))
        return found

    def rows(self, plan: pa.Table, columns: list[str]) -> Iterator[dict[str, Any]]:
        """The made rows of a plan, each once, part by part, parts in the order of their names."""
        for _, table in self.planned(index_of(plan["sample_id"]), columns):
            yield from table.to_pylist()

    def table(self, sample_ids: pa.ChunkedArray, columns: list[str]) -> pa.Table:
        """Columns of the made rows of a plan, each once and in its order; for small columns."""
        schema = pa.schema([IMAGE_SCHEMA.field(name) for name in ("sample_id", *columns)])
        ranks, tables = [np.empty(0, np.int64)], [schema.empty_table()]
        for positions, table in self.planned(index_of(sample_ids), columns):
            ranks.append(positions)
            tables.append(table)
        return pa.concat_tables(tables).take(np.argsort(np.concatenate(ranks), kind="stable"))

    def planned(
        self, index: PlanIndex, columns: list[str]
    ) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """(positions in the plan, `sample_id` and columns) of its made rows, each once, part by part.

        Holds a byte per row of the plan besides the parts that are read ahead.
        """
        seen = np.zeros(len(index), bool)
        for _, table in self.every(list(dict.fromkeys(["sample_id", *columns]))):
            positions = index.positions(table["sample_id"].to_pylist())
            new = positions >= 0
            new[new] = ~seen[positions[new]]
            _, first = np.unique(positions, return_index=True)
            new &= np.isin(np.arange(len(positions)), first)
            seen[positions[new]] = True
            yield positions[new], table if new.all() else table.filter(pa.array(new))

    def every(self, columns: list[str] | None) -> Iterator[tuple[str, pa.Table]]:
        """(name, table) of every part, the large ones by row groups.

        Parts may be packed into a larger one while they are read: that one is read then, and some of
        its rows come twice.
        """
        read: set[str] = set()
        vain = 0
        while True:
            before = len(read)
            try:
                for name, table in self.tables(
                    [name for name in self.parts() if name not in read], columns
                ):
                    read.add(name)
                    yield name, table
                return
            except FileNotFoundError:
                vain = vain + 1 if len(read) == before else 0
                if vain > LATE_LISTINGS:
                    raise
            time.sleep(0.1 * vain)

    def tables(
        self, names: list[str], columns: list[str] | None = None
    ) -> Iterator[tuple[str, pa.Table]]:
        """(name, table) of parts in the order given, a few small ones read ahead.

        Raises:
            FileNotFoundError: a part is gone.
        """
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            for at in range(0, len(names), READ_AHEAD):
                some = names[at : at + READ_AHEAD]
                if columns is not None and "image" not in columns:
                    read = pool.map(lambda name: self.read(name, columns), some)
                    yield from zip(some, read, strict=True)
                    continue
                small = [name for name in some if pack_range(name) is None]
                held = dict(
                    zip(small, pool.map(lambda name: self.read(name, columns), small), strict=True)
                )
                for name in some:
                    if name in held:
                        yield name, held.pop(name)
                    else:
                        yield from ((name, table) for table in self.groups(name, columns))

    def groups(
        self,
        name: str,
        columns: list[str] | None = None,
        *,
        order: np.random.Generator | None = None,
        ids: Collection[str] | None = None,
    ) -> Iterator[pa.Table]:
        """A part by its row groups.

        Args:
            order: shuffles the groups.
            ids: only these rows, from the groups that have any.
        """
        with self._open(name) as file:
            numbers = np.arange(file.num_row_groups)
            for group in numbers if order is None else order.permutation(numbers):
                mask = None
                if ids is not None:
                    found = self._group(file, group, ["sample_id"])["sample_id"].to_pylist()
                    mask = pa.array([sample_id in ids for sample_id in found])
                    if not any(mask.to_pylist()):
                        continue
                table = self._group(file, group, columns)
                yield table if mask is None else table.filter(mask)

    def _group(self, file: pq.ParquetFile, group: int, columns: list[str] | None) -> pa.Table:
        table = self.folder.patiently(lambda: file.read_row_group(int(group), columns))
        return table if columns is None else table.select(columns)

    @contextmanager
    def _open(self, name: str) -> Iterator[pq.ParquetFile]:
        with self._noted(name), self.folder.open_table(name) as file:
            yield file


def part_name(sample_ids: list[str]) -> str:
    """The name of the part that holds these rows."""
    digest = hashlib.sha256("\n".join(sample_ids).encode()).hexdigest()[:16]
    return f"part-{digest}.parquet"


def pack_name(sample_ids: list[str], start: int) -> str:
    """The name of the large part of these rows, which are those of the plan from `start` on."""
    stem = part_name(sample_ids).removesuffix(".parquet")
    return f"{stem}-{start}-{start + len(sample_ids)}.parquet"


def pack_range(name: str) -> tuple[int, int] | None:
    """The rows of the plan, first and one past the last, that a large part's name says; else None."""
    found = PACK.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


def index_of(sample_ids: pa.ChunkedArray | pa.Array) -> PlanIndex:
    """Where the rows of a plan stand, from its column of ids."""
    chunks = sample_ids.chunks if isinstance(sample_ids, pa.ChunkedArray) else [sample_ids]
    step = 65_536
    return PlanIndex(
        chunk.slice(at, step).to_pylist() for chunk in chunks for at in range(0, len(chunk), step)
    )
