"""Parquet sets too large for memory, written once as files from which single images can be read.

Parquet gives whole row groups. Training reads images in an order over the whole set, so they are written
by Ray tasks into plain tar files, with an index of where the bytes of each begin.
"""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from ray_synth.config import SourceConfig
from ray_synth.data.dataset import ROWS_PER_TASK, Index, read_task, tasks
from ray_synth.data.sources import Shard
from ray_synth.data.tars import MEMBERS
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
ROWS_PER_FILE = 4 * ROWS_PER_TASK  # 450 MB of ImageNet
PACK_CPUS = 0.5
Unit = dict[str, Any]


def addressable(index: Index, folder: Folder) -> Index:
    """The same images in the same order, each of which can be read alone; in Ray tasks.

    What was written before, by a run that was stopped or by another arm, is used again.

    Args:
        folder: for the tar files, where the source is a Parquet set.
    """
    import ray

    if all(shard.addressable for shard in index.shards):
        return index
    files = _files(tasks(index))
    folder = folder.child(_digest(index))
    folder.sweep()
    log.info("%d Parquet images are written once as %d tar files", len(index), len(files))
    write = ray.remote(num_cpus=PACK_CPUS)(write_tar)
    names = [f"part-{number:05d}.tar" for number in range(len(files))]
    members = ray.get([write.remote(*pair, folder) for pair in zip(files, names, strict=True)])
    source = SourceConfig(format="webdataset", path=folder.uri)
    counts = [len(found) for found in members]
    return Index(
        index.class_names,
        tuple(
            Shard(source, folder.path(name), 0, len(found), found)
            for name, found in zip(names, members, strict=True)
        ),
        np.repeat(np.arange(len(files)), counts),
        np.concatenate([np.arange(count) for count in counts]),
        np.array([label for units in files for unit in units for label in unit["labels"]]),
    )


def write_tar(units: list[Unit], name: str, folder: Folder) -> pa.RecordBatch:
    """Write the images of some units into one tar file; its `MEMBERS`, whose names are image ids.

    The table beside the tar is written last: where it is, the tar is whole.
    """
    table = f"{name}.parquet"
    if folder.exists(table):
        return folder.read_table(table).combine_chunks().to_batches()[0]
    rows: list[tuple[str, str, int, int]] = []
    with folder.stream(name) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for unit in units:
            for row in read_task(unit):
                data = row["image"]
                info = tarfile.TarInfo(f"{len(rows):08d}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                begin = tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                rows.append((row["image_id"], str(row["class_index"]), begin, len(data)))
    columns = zip(zip(*rows, strict=True), MEMBERS.types, strict=True)
    members = pa.record_batch([pa.array(c, t) for c, t in columns], schema=MEMBERS)
    folder.write_table(table, pa.Table.from_batches([members]))
    return members


def _files(units: list[Unit]) -> list[list[Unit]]:
    """Units that go into one file, in their order."""
    ends = np.cumsum([len(unit["rows"]) for unit in units])
    files = ((ends - 1) // ROWS_PER_FILE).tolist()
    pairs = zip(files, units, strict=True)
    return [[unit for _, unit in group] for _, group in groupby(pairs, key=lambda pair: pair[0])]


def _digest(index: Index) -> str:
    """Names the images of an index, in their order."""
    found = hashlib.sha256(index.shard.tobytes() + index.row.tobytes())
    for shard in index.shards:
        found.update(f"{shard.source.path}\n{shard.place}\n{shard.start}\n".encode())
        if shard.source.value_range:  # it goes with the bytes
            found.update(f"{shard.source.value_range}\n".encode())
    return found.hexdigest()[:16]
