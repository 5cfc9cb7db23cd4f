"""A run's images as ImageFolder, WebDataset or Hugging Face dataset, with a dataset card.

A finished (or growing) store in; files that each format's own library loads out. Encoded bytes are
passed on as they are, part by part.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_synth.data.images import SUFFIXES, file_suffix
from ray_synth.errors import UserError
from ray_synth.export.card import Exported, dataset_card
from ray_synth.export.names import class_list, folder_names
from ray_synth.generation.selection import choose, count_by, read_chosen, scan
from ray_synth.generation.store import IMAGE_SCHEMA
from ray_synth.storage.damage import damaged
from ray_synth.storage.folder import Folder

LAYOUTS = ("imagefolder", "webdataset", "huggingface")
Row = dict[str, Any]
MARKER = ".ray-synth-export.json"
# The files of an export: one that fits and was not written this time is of an earlier state.
OWN = {
    "imagefolder": rf"metadata\.parquet|[^/]+/[\w-]+\.({'|'.join(sorted(set(SUFFIXES.values())))})",
    "webdataset": r"shard-\d{6}\.tar",
    "huggingface": r"data/train-\d{5}\.parquet",
}
UNFINISHED = r"(.*/)?\.[^/]+\.[0-9a-f]{8}\.tmp"
GROUP_ROWS, GROUP_BYTES = 1_000, 32_000_000  # a row group of Parquet, held in memory


def export_images(
    run_folder: Folder,
    to: Folder | str | Path,
    *,
    layout: str,
    accepted_only: bool = True,
    class_names: Collection[str] | None = None,
    kinds: Collection[str] | None = None,
    limit: int | None = None,
    shard_rows: int = 10_000,
    shard_bytes: int = 500_000_000,
    licence: str | None = None,
) -> dict[str, Any]:
    """Write a run's images, and a card about them as README.md, into a folder of their own.

    Every file appears whole. The same export again gives the same bytes; one that was interrupted is
    finished by running it again. Images whose bytes are not a picture are left out and counted.

    Args:
        layout: imagefolder, webdataset or huggingface.
        to: a folder or URI that is empty, or holds an earlier state of the same export. Hidden files
            in it (.git) are left alone.
        class_names, kinds, limit: see `choose`. Class indices stay those of the run.
        shard_rows, shard_bytes: a shard is closed by whichever comes first (not imagefolder).
        licence: identifier for the card, such as cc-by-4.0; default: `other`, and why.

    Returns:
        `layout`, `to`, `exported`, `unreadable`, `classes` ({name: images}), `kinds` ({kind: images})
        and `files` of the export, and `rejected` of the whole run.

    Raises:
        UserError: unknown layout, nothing to export, or a folder that holds something else.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: one of {', '.join(LAYOUTS)}")
    if shard_rows < 1 or shard_bytes < 1:
        raise UserError(f"shards of {shard_rows} rows or {shard_bytes} bytes: give 1 or more")
    facts = scan(run_folder)
    accepted = False if accepted_only else None
    chosen = choose(facts, class_names=class_names, kinds=kinds, rejected=accepted, limit=limit)
    to = to if isinstance(to, Folder) else Folder(to)
    export = {
        "run": run_folder.name, "layout": layout, "accepted_only": accepted_only,
        "class_names": sorted(set(class_names or ())), "kinds": sorted(set(kinds or ())),
        "limit": limit,
    }  # fmt: skip
    _claim(to, export)
    classes = _classes(run_folder, facts)
    done = Exported(export)
    rows = _pictures(run_folder, chosen, done)
    written = _write(rows, to, classes, layout, (shard_rows, shard_bytes))
    if not done.total:
        raise UserError(f"none of the {chosen.num_rows} images of this slice is readable")
    done.files = len(written)
    _remove_stale(to, layout, written)
    card = dataset_card(run_folder, done, facts=facts, classes=classes, licence=licence)
    to.write_bytes("README.md", card.encode())
    to.write_json(MARKER, {**export, "complete": True})
    rejected = count_by(facts, "accepted").get(False, 0)
    return {"layout": layout, "to": to.address(), **done.summary(classes), "rejected": rejected}


def _classes(run_folder: Folder, facts: pa.Table) -> list[str]:
    """The names of the run's classes. Raises DamagedFile, which names it, for a part with other ones."""
    classes = class_list(run_folder)
    index = facts["class_index"]
    fits = pc.and_(pc.greater_equal(index, 0), pc.less(index, len(classes)))
    wrong = facts.filter(pc.invert(pc.fill_null(fits, False)))
    if wrong.num_rows:
        why = f"it holds class {wrong['class_index'][0]}, and the run has {len(classes)}"
        raise damaged(str(wrong["part"][0]), why)
    return classes


def _write(
    rows: Iterator[Row], to: Folder, classes: list[str], layout: str, shard: tuple[int, int]
) -> set[str]:
    """The images in their layout; the names of the files. `shard`: at most so many rows, and bytes."""
    if layout == "imagefolder":
        return _write_imagefolder(rows, to, classes)
    write = _write_webdataset if layout == "webdataset" else _write_huggingface
    return write(_sharded(rows, *shard), to, classes)


def _pictures(run_folder: Folder, chosen: pa.Table, done: Exported) -> Iterator[Row]:
    """The chosen rows with the `suffix` of their bytes' format, counted in `done` as they pass."""
    for part in read_chosen(run_folder, chosen):
        for row in part:
            if not re.fullmatch(r"[\w-]+", row["sample_id"], re.ASCII):
                raise UserError(f"sample id {row['sample_id']!r} cannot name a file")
            suffix = file_suffix(row["image"] or b"")
            if suffix is None:
                done.unreadable += 1
            else:
                done.add(row)
                yield {**row, "suffix": suffix}


def _sharded(
    rows: Iterator[Row], shard_rows: int, shard_bytes: int
) -> Iterator[tuple[int, Iterator[Row]]]:
    """(number, rows) of each shard; the rows must be used up before the next is asked for."""

    def numbered() -> Iterator[tuple[int, Row]]:
        shard = count = size = 0
        for row in rows:
            if count and (count >= shard_rows or size >= shard_bytes):
                shard, count, size = shard + 1, 0, 0
            count, size = count + 1, size + len(row["image"])
            yield shard, row

    for shard, pairs in itertools.groupby(numbered(), key=lambda pair: pair[0]):
        yield shard, (row for _, row in pairs)


def _write_imagefolder(rows: Iterator[Row], to: Folder, classes: list[str]) -> set[str]:
    folders = folder_names(classes)
    names = [name for name in IMAGE_SCHEMA.names if name != "image"]
    text = [pa.field("file_name", pa.string()), pa.field("label", pa.string())]
    schema = pa.schema([*text, *(IMAGE_SCHEMA.field(name) for name in names)])
    written = {"metadata.parquet"}
    # An export that was interrupted is written again, every file of it.
    write = partial(to.write_bytes, durable=False)
    with to.stream("metadata.parquet") as stream, ThreadPoolExecutor(16) as pool:

        def saved() -> Iterator[Row]:
            while some := list(itertools.islice(rows, 64)):
                files = [
                    f"{folders[r['class_index']]}/{r['sample_id']}.{r['suffix']}" for r in some
                ]
                list(pool.map(write, files, [row["image"] for row in some]))
                written.update(files)
                for name, row in zip(files, some, strict=True):
                    del row["image"]  # it is written: a row group of metadata need not hold it
                    yield {**row, "file_name": name, "label": classes[row["class_index"]]}

        _write_table(stream, schema, saved())
    return written


def _write_webdataset(
    shards: Iterator[tuple[int, Iterator[Row]]], to: Folder, classes: list[str]
) -> set[str]:
    import webdataset

    written = set()
    for number, rows in shards:
        name = f"shard-{number:06d}.tar"
        # A fixed time makes the same export the same bytes; user and mode are fixed by default.
        with to.stream(name) as stream, webdataset.TarWriter(stream, mtime=0) as tar:
            for row in rows:
                facts = {name: row[name] for name in IMAGE_SCHEMA.names if name != "image"}
                facts = {"label": classes[row["class_index"]], **facts}
                tar.write(
                    {
                        "__key__": row["sample_id"],
                        row["suffix"]: row["image"],
                        "cls": row["class_index"],
                        "json": json.dumps(facts, ensure_ascii=False).encode(),
                    }
                )
        written.add(name)
    return written


def _write_huggingface(
    shards: Iterator[tuple[int, Iterator[Row]]], to: Folder, classes: list[str]
) -> set[str]:
    import datasets

    others = pa.schema([field for field in IMAGE_SCHEMA if field.name != "image"])
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=classes),
            **datasets.Features.from_arrow_schema(others),
        }
    )
    written = set()
    for number, rows in shards:
        name = f"data/train-{number:05d}.parquet"
        with to.stream(name) as stream:
            cells = (
                {
                    **row,
                    "image": {"bytes": row["image"], "path": f"{row['sample_id']}.{row['suffix']}"},
                    "label": row["class_index"],
                }
                for row in rows
            )
            _write_table(stream, features.arrow_schema, cells)
        written.add(name)
    return written


def _write_table(stream: pa.NativeFile, schema: pa.Schema, rows: Iterator[Row]) -> None:
    """Rows as one Parquet file; a row group is what is held in memory."""
    with pq.ParquetWriter(stream, schema, write_page_index=True) as writer:
        group: list[Row] = []
        size = 0
        for row in rows:
            group.append(row)
            size += len(row["image"]["bytes"]) if "image" in row else 0
            if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group, size = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _claim(to: Folder, export: dict[str, Any]) -> None:
    """Mark a folder as this export's. Raises UserError where it holds anything else."""
    kind = to.filesystem.get_file_info(to.path()).type
    if kind == pafs.FileType.File:
        raise UserError(f"{to.address()} is a file; give a folder to export into")
    if to.exists(MARKER):
        before = to.read_json(MARKER)
        changes = [f"{k}: {before.get(k)} -> {v}" for k, v in export.items() if before.get(k) != v]
        if changes:
            raise UserError(
                f"{to.address()} holds another export ({'; '.join(changes)}); give another folder, or "
                "delete this one first"
            )
    else:
        found = to.filesystem.get_file_info(pafs.FileSelector(to.path(), allow_not_found=True))
        others = sorted(info.base_name for info in found if not info.base_name.startswith("."))
        if others:
            raise UserError(
                f"{to.address()} is not empty and holds no export (there is {others[0]}); give a new or "
                "an empty folder"
            )
    to.write_json(MARKER, {**export, "complete": False})


def _remove_stale(to: Folder, layout: str, written: set[str]) -> None:
    """Delete what an earlier state of the export left, and folders that are empty then."""
    root = to.path()
    found = to.filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    files = {info.path[len(root) :].lstrip("/") for info in found if info.is_file}
    own = re.compile(f"{OWN[layout]}|{UNFINISHED}")
    stale = {name for name in files - written if own.fullmatch(name)}
    for name in stale:
        to.filesystem.delete_file(to.path(name))
    used = {name.rpartition("/")[0] for name in files - stale}
    emptied = {name.rpartition("/")[0] for name in stale} - used
    for folder in emptied if to.is_local else ():
        to.filesystem.delete_dir(to.path(folder))
