"""Every image of a set is decoded once, in Ray tasks, before anything is spent; huge sets by a sample."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from ray_synth.data.dataset import Index, read_task, tasks, turns, wanted
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError, shortened

INSPECT_CPUS = 0.5


@dataclass(frozen=True)
class Inspected:
    """What was found of the rows of an index.

    Attributes:
        looked: (rows,) bool, which were looked at.
        bad: (rows,) bool, which of them cannot be decoded.
        corrupt: `{image_id, error}` of each of those.
        marks: (rows,) int64, a digest of each one's encoded bytes; 0 where it was not looked at.
    """

    looked: np.ndarray
    bad: np.ndarray
    corrupt: list[dict[str, str]]
    marks: np.ndarray


def inspect(index: Index, *, max_pixels: int) -> Inspected:
    """Decode every image of an index once, in Ray tasks."""
    import ray

    def check(task: dict[str, Any]) -> tuple[np.ndarray, list[dict[str, str]]]:
        marks, broken = [], []
        for item in read_task(task):
            marks.append(mark(item["image"]))
            try:
                decode_image(item["image"], max_pixels=max_pixels)
            except UserError as error:
                broken.append(
                    {"at": len(marks) - 1, "image_id": item["image_id"], "error": str(error)}
                )
        return np.array(marks, dtype=np.int64), broken

    remote = ray.remote(num_cpus=INSPECT_CPUS)(check)
    order = np.lexsort((index.row, index.shard))  # of the tasks
    bad, marks = np.zeros(len(index), dtype=bool), np.zeros(len(index), dtype=np.int64)
    corrupt, start = [], 0
    for found, broken in ray.get([remote.remote(task) for task in tasks(index)]):
        marks[order[start : start + len(found)]] = found
        for item in broken:
            bad[order[start + item.pop("at")]] = True
            corrupt.append(item)
        start += len(found)
    return Inspected(np.ones(len(index), dtype=bool), bad, corrupt, marks)


def mark(data: bytes) -> int:
    """63 bits of a digest of some bytes."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") >> 1


def inspect_drawn(
    pool: Index,
    images_per_class: int | dict[str, int] | None,
    seed: int,
    *,
    max_pixels: int,
    most: int,
) -> Inspected:
    """Inspect as many images of a pool as are to be drawn from it, and others for those that fail.

    With what is returned as `bad`, `select(pool, images_per_class, seed, without=bad)` draws none that
    was seen to fail, and the same ones each time.

    Args:
        most: so many are looked at; a sample where there are more.
    """
    number, turn = wanted(pool, images_per_class), turns(pool, seed)
    looked, bad = np.zeros(len(pool), dtype=bool), np.zeros(len(pool), dtype=bool)
    marks, corrupt = np.zeros(len(pool), dtype=np.int64), []
    until = number
    while len(rows := np.flatnonzero((turn < until[pool.label]) & ~looked)):
        whole = len(rows) <= most
        rows = rows[sample(pool.take(rows), most)]
        found = inspect(pool.take(rows), max_pixels=max_pixels)
        looked[rows], bad[rows], marks[rows] = True, found.bad, found.marks
        corrupt += found.corrupt
        if not whole:
            break
        # Twice as many as fail: a class of which all do is seen through in few rounds.
        until = number + 2 * np.bincount(pool.label[bad], minlength=len(number))
    return Inspected(looked, bad, corrupt, marks)


def sample(index: Index, most: int) -> np.ndarray:
    """Rows of an index, evenly spread over it: all, or about `most` of more.

    Of a set that gives no single image, whole units of reading are taken.
    """
    if len(index) <= most:
        return np.arange(len(index))
    order = np.lexsort((index.row, index.shard))
    if all(shard.addressable for shard in index.shards):
        return np.sort(order[np.linspace(0, len(order) - 1, most).astype(np.int64)])
    ends = np.cumsum([len(task["rows"]) for task in tasks(index)])
    units = max(1, round(len(ends) * most / len(index)))
    chosen = np.linspace(0, len(ends) - 1, units).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    return np.sort(np.concatenate([order[starts[at] : ends[at]] for at in chosen]))


def refuse_broken(name: str, looked: int, corrupt: list[dict[str, str]], share: float) -> None:
    """Stop a run whose set is broken as a whole.

    Args:
        looked: how many images were looked at.
        share: of them that may fail.

    Raises:
        UserError: more failed; names the first of them, and why.
    """
    if not corrupt or len(corrupt) <= share * looked:
        return
    told = [f"{item['image_id']}: {item['error']}" for item in corrupt]
    raise UserError(
        f"{name}: {len(corrupt):,} of the {looked:,} images looked at cannot be used, and "
        f"data.max_corrupt lets a share of {share:g} fail:\n  " + shortened(told, 3, joint="\n  ")
    )
