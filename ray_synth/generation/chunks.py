"""A plan cut into chunks of one generator batch each, and which part of the store holds each row. No Ray.

Chunks lie at fixed places of the plan, so that whoever makes a chunk, and however often, writes the same
part. A finished chunk is known by its part's name alone, and so is a range of the plan that was packed
into one large part.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_synth.generation.checking import good_parts
from ray_synth.generation.store import ImageStore, pack_range, part_name
from ray_synth.prompting.plan_file import WINDOW, Plan
from ray_synth.prompting.plan_index import PlanIndex

ATTEMPTS = 5  # at a store whose parts are packed while it is looked at


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of a plan; `parts` of the store hold all, some or none of them."""

    start: int
    stop: int
    parts: tuple[str, ...]
    missing: int


@dataclass(frozen=True, eq=False)
class Holdings:
    """Which part of a store holds each row of a plan: 8 bytes a row.

    Attributes:
        names: of the parts that hold rows.
        part: (rows,) int32, the place in `names` of the part that holds a row; -1 where none does.
        row: (rows,) int32, which of the part's rows it is.
        stale: parts all of whose rows other parts hold as well.
    """

    names: list[str]
    part: np.ndarray
    row: np.ndarray
    stale: list[str] = field(default_factory=list)

    def hold(self, name: str, positions: np.ndarray | slice, rows: np.ndarray) -> int:
        """Note that a part holds the rows at some positions, where none did; how many those are."""
        free = self.part[positions] < 0
        if free.any():
            self.part[positions] = np.where(free, len(self.names), self.part[positions])
            self.row[positions] = np.where(free, rows, self.row[positions])
            self.names.append(name)
        return int(free.sum())


def holdings(plan: Plan, store: ImageStore, batch_size: int) -> Holdings:
    """Look up all rows of a plan.

    The store is listed once, and damaged parts are set aside (`checking.py`). Rows are read only where
    parts are neither packs nor chunks of this plan: they were made with another batch size, or for an
    earlier plan, and their rows are looked up by id. Of two parts that hold a row, a pack counts.
    """
    for _ in range(ATTEMPTS):
        try:
            return _holdings(plan, store, batch_size)
        except FileNotFoundError as error:  # a part was packed since it was listed: list again
            gone = error
    raise gone


def _holdings(plan: Plan, store: ImageStore, batch_size: int) -> Holdings:
    rows = len(plan)
    held = Holdings([], np.full(rows, -1, np.int32), np.zeros(rows, np.int32))
    others = set(good_parts(store))
    packs = sorted((*span, name) for name in others if (span := pack_range(name)) is not None)
    any_small = len(packs) < len(others)
    chunks: list[tuple[int, int, str]] = []
    open_packs: list[_Pack] = []
    for number, ids in enumerate(plan.ids(batch_size) if others else ()):
        start = number * batch_size
        stop = start + len(ids)
        while packs and packs[0][0] < stop:
            open_packs.append(_Pack(*packs.pop(0)))
        for pack in open_packs:
            pack.see(start, ids)
            if pack.stop <= stop and pack.is_right():
                _hold_range(held, pack.name, pack.start, pack.stop)
                others.discard(pack.name)
        open_packs = [pack for pack in open_packs if pack.stop > stop]
        name = part_name(ids) if any_small else ""
        if name in others:
            chunks.append((start, stop, name))
            others.discard(name)
    for start, stop, name in chunks:
        _hold_range(held, name, start, stop)
    if others:
        look_up(held, plan, store, others)
    return held


def _hold_range(held: Holdings, name: str, start: int, stop: int) -> None:
    if not held.hold(name, slice(start, stop), np.arange(stop - start)):
        held.stale.append(name)


class _Pack:
    """A pack whose name is compared with the plan's ids as they pass."""

    def __init__(self, start: int, stop: int, name: str) -> None:
        self.start, self.stop, self.name = start, stop, name
        self._digest = hashlib.sha256()
        self._joint = ""

    def see(self, start: int, ids: list[str]) -> None:
        own = ids[max(self.start - start, 0) : self.stop - start]
        self._digest.update((self._joint + "\n".join(own)).encode())
        self._joint = "\n"

    def is_right(self) -> bool:
        return self.name.startswith(f"part-{self._digest.hexdigest()[:16]}-")


def look_up(held: Holdings, plan: Plan, store: ImageStore, names: set[str]) -> None:
    """Find the rows of parts whose names do not tell."""
    index = PlanIndex(plan.ids(WINDOW))
    for name, table in store.tables(sorted(names), ["sample_id"]):
        positions = index.positions(table["sample_id"].to_pylist())
        there = np.flatnonzero(positions >= 0)
        new = held.hold(name, positions[there], there)
        if not new and len(there) == len(positions):
            held.stale.append(name)


def cut(plan: Plan, store: ImageStore, batch_size: int) -> list[Chunk]:
    """All chunks of a plan, with what the store has of them."""
    return chunks_of(holdings(plan, store, batch_size), batch_size)


def chunks_of(held: Holdings, batch_size: int) -> list[Chunk]:
    """The same from what was looked up."""
    rows = len(held.part)
    padded = np.pad(held.part, (0, -rows % batch_size), mode="edge") if rows else held.part
    table = padded.reshape(-1, batch_size)
    low, high = table.min(axis=1).tolist(), table.max(axis=1).tolist()
    found: list[Chunk] = []
    for number, (least, most) in enumerate(zip(low, high, strict=True)):
        start = number * batch_size
        stop = min(start + batch_size, rows)
        if least == most:
            parts: Any = (held.names[most],) if most >= 0 else ()
            found.append(Chunk(start, stop, parts, 0 if most >= 0 else stop - start))
        else:
            own = held.part[start:stop]
            parts = tuple(sorted(held.names[i] for i in np.unique(own[own >= 0])))
            found.append(Chunk(start, stop, parts, int((own < 0).sum())))
    return found


def missing_rows(chunks: list[Chunk]) -> int:
    return sum(chunk.missing for chunk in chunks)
