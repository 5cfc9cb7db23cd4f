"""Small parts to large ones: half a million batches of a long plan become a few thousand files.

The plan is divided into ranges of a fixed number of rows, which depends on the size of the images alone.
Once all rows of a range are in the store, a task writes them in plan order into one part, a *pack*, whose
name has the digest of their ids and the range; the small parts are deleted when the pack is there. What
a kill leaves is a range that is not packed yet, or small parts that a pack holds as well: both are set
right later. What is left over at the end of a plan stays in small parts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ray_synth.config import GenerationConfig
from ray_synth.generation.checking import set_aside
from ray_synth.generation.chunks import Holdings
from ray_synth.generation.store import ImageStore, pack_name, pack_range, part_name
from ray_synth.prompting.plan_file import Plan
from ray_synth.storage.damage import DamagedFile, damaged

log = logging.getLogger("ray_synth")
PACK_BYTES = 256 << 20
GROUP_BYTES = 4 << 20  # of a row group: what is read at once
MOST_PACK_ROWS, MOST_GROUP_ROWS = 16_384, 512
# Of encoded photographs; drawings take less.
BYTES_PER_PIXEL = {"png": 1.6, "webp": 0.35, "jpeg": 0.4}
TASKS_PER_NODE = 2


def group_rows(config: GenerationConfig) -> int:
    """Rows of a row group of a pack, a power of two."""
    return _rows(config, GROUP_BYTES, MOST_GROUP_ROWS)


def pack_rows(config: GenerationConfig) -> int:
    """Rows of a pack, a power of two."""
    return _rows(config, PACK_BYTES, MOST_PACK_ROWS)


def _rows(config: GenerationConfig, size: int, most: int) -> int:
    pixels = (config.width or 512) * (config.height or 512)
    each = pixels * BYTES_PER_PIXEL[config.encoding["image_format"]]
    fits = max(1, int(size / each))
    return min(most, 1 << (fits.bit_length() - 1))


@dataclass(frozen=True)
class PackTask:
    """Rows `start` to `stop` of a plan, which `parts` hold, to be written as one part."""

    plan: Plan
    store: ImageStore
    start: int
    stop: int
    parts: tuple[str, ...]
    group_rows: int

    def run(self) -> str:
        """Write the pack and delete the parts that it holds whole; the pack's name.

        Where a part is damaged, it is set aside, no pack is written, and the name is empty.

        Raises:
            FileNotFoundError: a part is gone, and no pack has its place.
            UserError: the parts lack rows: one holds others than its name says.
        """
        ids = self.plan.ids_of(self.start, self.stop)
        name = pack_name(ids, self.start)
        used: dict[str, int] = {}
        sizes: dict[str, int] = {}
        if not self.store.holds(name):
            try:
                self.store.write_pack(name, self._groups(ids, used, sizes))
            except FileNotFoundError:
                if not self.store.holds(name):  # else another task was first
                    raise
            except DamagedFile as error:
                log.warning("set aside, and its images are made again: %s", error)
                for part in set(self.store.suspected()) & set(self.parts):
                    set_aside(self.store, part)
                return ""
            except LookupError as error:
                for part in self.parts:
                    self.store.suspect(part)
                raise damaged(
                    self.store.folder.address(self.parts[0]), f"or a part beside: {error}"
                ) from error
        self.store.delete(part for part, rows in used.items() if rows == sizes[part])
        return name

    def _groups(
        self, ids: list[str], used: dict[str, int], sizes: dict[str, int]
    ) -> Iterator[pa.Table]:
        """The rows in order, a row group at a time; counts the rows of each part, and those taken."""
        waiting: dict[str, tuple[str, pa.Table]] = {}
        tables = self.store.tables(list(self.parts))
        for at in range(0, len(ids), self.group_rows):
            rows = []
            for sample_id in ids[at : at + self.group_rows]:
                while sample_id not in waiting:
                    part, table = next(tables, ("", None))
                    if table is None:
                        raise LookupError(f"no part holds {sample_id} of rows {self.start} on")
                    sizes[part] = sizes.get(part, 0) + table.num_rows
                    for place, found in enumerate(table["sample_id"].to_pylist()):
                        waiting[found] = (part, table.slice(place, 1))
                part, row = waiting.pop(sample_id)
                used[part] = used.get(part, 0) + 1
                rows.append(row)
            yield pa.concat_tables(rows).combine_chunks()


def packs_to_write(
    plan: Plan, store: ImageStore, held: Holdings, rows: int, group: int
) -> Iterator[PackTask]:
    """A task for each whole range of `rows` that lies in small parts, all of it made."""
    small = np.array([pack_range(name) is None for name in held.names] + [True])
    for start in range(0, len(held.part) - rows + 1, rows):
        part = held.part[start : start + rows]
        if (part < 0).any():
            continue
        # Packs of another size, from an earlier plan or version, may hold a piece of the range.
        edges = np.flatnonzero(np.diff(small[part])) + 1
        for piece in np.split(np.arange(rows), edges):
            if small[part[piece[0]]] and len(piece) >= rows // 2:
                names = held.names
                _, first = np.unique(part[piece], return_index=True)
                ordered = tuple(names[part[piece[at]]] for at in sorted(first))
                begin = start + int(piece[0])
                yield PackTask(plan, store, begin, begin + len(piece), ordered, group)


def write_packs(tasks: Iterator[Any]) -> int:
    """Run tasks, of this module or of `gathering`, beside whatever else the cluster does; how many."""
    import ray

    run, most = _remote(), _most_at_once()
    done = 0
    running: list[Any] = []
    for task in tasks:
        if not running:
            log.info("packing images of the store into large files")
        running.append(run.remote(task))
        done += 1
        if len(running) >= most:
            finished, running = ray.wait(running)
            ray.get(finished)
    ray.get(running)
    return done


def _remote() -> Any:
    import ray

    # No CPU of its own: it mostly waits for the storage, and must not wait for makers to end.
    return ray.remote(num_cpus=0, scheduling_strategy="SPREAD", max_retries=3)(_run)


def _run(task: Any) -> Any:
    return task.run()


def _most_at_once() -> int:
    import ray

    return TASKS_PER_NODE * max(1, sum(node["Alive"] for node in ray.nodes()))


class Packer:
    """The actor that hears which chunks were made, and starts a task when a range is whole.

    Args:
        chunks: starts of the chunks that the stream will make.
    """

    def __init__(
        self, plan: Plan, store: ImageStore, chunks: list[int], batch: int, rows: int, group: int
    ) -> None:
        self.plan, self.store, self.batch, self.rows, self.group = plan, store, batch, rows, group
        self.missing: dict[int, set[int]] = {}
        for start in chunks:
            self.missing.setdefault(start // rows, set()).add(start)
        # A range at the plan's end that is not whole.
        self.missing.pop(len(plan) // rows, None)
        self._waiting: list[PackTask] = []
        self._running: list[Any] = []

    def made(self, start: int) -> None:
        """A chunk is in the store."""
        number = start // self.rows
        left = self.missing.get(number)
        if left is not None:
            left.discard(start)
            if not left:
                del self.missing[number]
                self._waiting.append(self._task(number * self.rows))
        self._start()

    def _task(self, start: int) -> PackTask:
        ids = self.plan.ids_of(start, start + self.rows)
        names = (part_name(ids[at : at + self.batch]) for at in range(0, len(ids), self.batch))
        return PackTask(self.plan, self.store, start, start + self.rows, (*names,), self.group)

    def _start(self) -> None:
        import ray

        if self._running:
            finished, self._running = ray.wait(
                self._running, num_returns=len(self._running), timeout=0
            )
            for ref in finished:
                try:
                    ray.get(ref)
                except Exception as error:  # the end of the stage looks at what is left
                    log.debug("a range is not packed yet: %s", error)
        while self._waiting and len(self._running) < _most_at_once():
            self._running.append(_remote().remote(self._waiting.pop(0)))
