"""Memory that decoding processes share with the one that trains: how much, and whether there is room.

In: sizes. Out: tensors in `/dev/shm`, and how many processes fit there.
"""

from __future__ import annotations

import logging
import shutil

import torch
from torch import Tensor

log = logging.getLogger("ray_synth")
AHEAD = 2  # batches that each process has to do
SHARE = 0.8  # of what is free that pixels may take: encoded images go through it, too


def slots_of(workers: int) -> int:
    """Batches in shared memory: those under way, and the one that was yielded last."""
    return AHEAD * workers + 1


def with_room(workers: int, batch_bytes: int, place: str = "/dev/shm") -> int:
    """As many of the processes as shared memory has room for, with a warning where it is fewer.

    More would end in a bus error: containers have 64 MB unless they are told otherwise. What is drawn
    does not depend on their number.

    Args:
        batch_bytes: pixels of one batch.
        place: where shared memory lies; there is no limit where there is no such place.
    """
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return workers
    room = int(SHARE * free) // batch_bytes - 1  # in batches under way
    fitting = min(workers, max(0, room // AHEAD))
    if fitting < workers:
        log.warning(
            "%s of this node has %.0f MB free: %d of %d decoding processes fit into it, and training may "
            "wait for images. %d take %.0f MB: give the container more shared memory (--shm-size, or a "
            "volume of medium Memory at %s), or set training.decode_workers=%d",
            place, free / 1e6, fitting, workers, workers,
            slots_of(workers) * batch_bytes / SHARE / 1e6, place, fitting,
        )  # fmt: skip
    return fitting


def shared_bytes(size: int) -> Tensor:
    """(size,) uint8 in memory that processes share, as torch's own default_collate makes its batches."""
    storage = torch.UntypedStorage._new_shared(size) if size else torch.UntypedStorage(0)
    return torch.tensor([], dtype=torch.uint8).set_(storage, 0, (size,))  # type: ignore[call-overload]


def packed(parts: list[bytes]) -> Tensor:
    """Bytes one after the other in shared memory, copied once; (total,) uint8."""
    whole = shared_bytes(sum(map(len, parts)))
    view, start = whole.numpy().data, 0
    for part in parts:
        view[start : start + len(part)] = part
        start += len(part)
    return whole
