"""What the files of a set were when a run looked at them, and what has changed since.

Names, sizes and times are what a listing tells. Contents are compared only of files whose time alone
differs, as after a copy.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from ray_synth.config import SourceConfig
from ray_synth.data.boundary import reading
from ray_synth.data.dataset import Index
from ray_synth.data.inspection import mark
from ray_synth.data.places import Place
from ray_synth.errors import shortened
from ray_synth.storage.filesystems import at_once, open_uri
from ray_synth.storage.hub import is_hub_id

# `mark`, of the content: null where it is not known. `row`: of the index, -1 for a file of many images.
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("time", pa.int64()),
        ("mark", pa.int64()),
        ("row", pa.int64()),
    ]
)
MARK = SCHEMA.get_field_index("mark")
AT_A_TIME = 4_096  # files that a thread asks a local disk for
MOST_COMPARED = 2_000  # files whose contents are read again; of more, so many evenly spread ones
STRETCHES, STRETCH = 4, 256 * 2**10  # of a large file, which stand for all of it
NAMED = 3


def files(index: Index) -> pa.Table | None:
    """The files that an index's images are in, by name (`SCHEMA`); None for what ships with the package.

    Raises:
        UserError: a file is gone, or cannot be asked for.
    """
    source = index.shards[0].source if index.shards else SourceConfig(format="digits")
    match source.format:
        case "digits" | "uci_digits":
            return None
        case "imagefolder":
            return _pictures(index)
        case "huggingface" if is_hub_id(str(source.path)):
            count = index.shards[-1].stop
            return _table([(f"{source.path}@{source.revision}", count, 0)])
        case "huggingface":
            return _table(_listed(source))
    places = sorted({index.shards[at].place for at in np.unique(index.shard).tolist()})
    filesystem, _ = open_uri(str(source.path))

    def ask(place: str) -> tuple[str, int, int]:
        with reading(place):
            info = filesystem.get_file_info(place)
        return place, info.size or 0, info.mtime_ns or 0

    return _table(at_once(ask, places))


def _pictures(index: Index) -> pa.Table:
    """A row for each image of folders."""
    members = pa.Table.from_batches([shard.members for shard in index.shards])
    starts = np.cumsum([0, *(len(shard.members or ()) for shard in index.shards[:-1])])
    ends = members["name"].take(starts[index.shard] + index.row)
    names = pc.binary_join_element_wise(index.shards[0].place, ends, "/").combine_chunks()
    sizes, times = _stats(str(index.shards[0].source.path), names.to_pylist())
    nulls = pa.nulls(len(names), pa.int64())
    found = pa.table([names, sizes, times, nulls, np.arange(len(names))], schema=SCHEMA)
    return found.sort_by("name")


def _stats(uri: str, names: list[str]) -> tuple[list[int], list[int]]:
    """Sizes and times of files; -1 and 0 of those that are gone.

    A local disk is asked for each; an object store tells those of a folder by one listing.
    """
    if "://" not in uri:
        parts = [names[at : at + AT_A_TIME] for at in range(0, len(names), AT_A_TIME)]
        found = [
            pair for part in at_once(lambda part: list(map(_stat, part)), parts) for pair in part
        ]
        return [size for size, _ in found], [time for _, time in found]
    filesystem, _ = open_uri(uri)

    def listed(folder: str) -> list[pafs.FileInfo]:
        with reading(folder):
            return filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))

    folders = sorted({name.rpartition("/")[0] for name in names})
    known = {info.path: info for infos in at_once(listed, folders) for info in infos}
    infos = [known.get(name) for name in names]
    return (
        [-1 if info is None else info.size or 0 for info in infos],
        [0 if info is None else info.mtime_ns or 0 for info in infos],
    )


def _stat(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:  # it is told when the picture is looked at
        return -1, 0
    return found.st_size, found.st_mtime_ns


def _listed(source: SourceConfig) -> list[tuple[str, int, int]]:
    with reading(str(source.path)):
        filesystem, path = open_uri(str(source.path))
        found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    kept = (info for info in found if info.is_file and not info.base_name.startswith("cache-"))
    return sorted((info.path, info.size or 0, info.mtime_ns or 0) for info in kept)


def _table(rows: list[tuple[str, int, int]]) -> pa.Table:
    names, sizes, times = zip(*rows, strict=True) if rows else ((), (), ())
    nulls = [None] * len(rows)
    return pa.table([names, sizes, times, nulls, [-1] * len(rows)], schema=SCHEMA)


def digest(table: pa.Table) -> str:
    """16 hex digits of names, sizes and times."""
    found = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=65_536):
        found.update("\n".join(batch["name"].to_pylist()).encode())
        for column in ("size", "time"):
            found.update(batch[column].to_numpy().tobytes())
    return found.hexdigest()[:16]


def with_marks(table: pa.Table, source: SourceConfig, marks: np.ndarray | None = None) -> pa.Table:
    """The table with digests of contents: those given, or of what is read here of files of many images.

    Args:
        marks: of the rows of the index, where each is a file of its own; 0 is not known.
    """
    if marks is None and source.format == "huggingface" and is_hub_id(str(source.path)):
        return table  # a commit is its own digest
    if marks is None:
        rows = table.select(["name", "size"]).to_pylist()
        known = at_once(lambda row: _content(source, row["name"], row["size"]), rows)
        column = pa.array(known, pa.int64())
    else:
        mine = marks[table["row"].to_numpy()]
        column = pa.array(mine, pa.int64(), mask=mine == 0)
    return table.set_column(MARK, "mark", column)


@dataclass(frozen=True)
class Changes:
    """Names of files that differ from what they were."""

    added: list[str]
    removed: list[str]
    replaced: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.replaced)

    def __str__(self) -> str:
        parts = [
            f"{len(names):,} {what} ({shortened(names, NAMED)})"
            for what, names in vars(self).items()
            if names
        ]
        return "files " + ", ".join(parts)


def changes(kept: pa.Table, now: pa.Table, index: Index) -> Changes:
    """What has changed of the files that were kept.

    A file of the same size whose time differs is read: it may be a copy. Where there are many such
    files, `MOST_COMPARED` of them stand for all.

    Args:
        now: the `files` of `index`.
    """
    at = pc.index_in(now["name"], kept["name"])
    added = now.filter(pc.is_null(at))["name"].to_pylist()
    gone = pc.invert(pc.is_in(kept["name"], now["name"]))
    removed = kept.filter(gone)["name"].to_pylist()
    now = now.filter(pc.is_valid(at))
    before = kept.take(pc.drop_null(at))
    same_size = pc.equal(before["size"], now["size"])
    replaced = now.filter(pc.invert(same_size))["name"].to_pylist()
    touched = pc.and_(same_size, pc.not_equal(before["time"], now["time"]))
    asked = now.set_column(MARK, "mark", before["mark"])
    asked = asked.filter(pc.and_(touched, pc.is_valid(asked["mark"])))
    if len(asked) > MOST_COMPARED:
        asked = asked.take(np.linspace(0, len(asked) - 1, MOST_COMPARED).astype(np.int64))

    def differs(row: dict[str, Any]) -> bool:
        if row["row"] >= 0:
            return mark(index.locate(row["row"]).read()) != row["mark"]
        return _content(index.shards[0].source, row["name"], row["size"]) != row["mark"]

    rows = asked.to_pylist()
    found = at_once(differs, rows)
    replaced += [row["name"] for row, other in zip(rows, found, strict=True) if other]
    return Changes(added, removed, sorted(replaced))


def _content(source: SourceConfig, name: str, size: int) -> int:
    """Of a whole file, or of stretches of a large one, its head and its end among them."""
    begins = [0]
    if size > STRETCHES * STRETCH:
        begins = np.linspace(0, size - STRETCH, STRETCHES).astype(np.int64).tolist()
    length = STRETCH if len(begins) > 1 else size
    return mark(b"".join(Place(str(source.path), name, at, length).read() for at in begins))
