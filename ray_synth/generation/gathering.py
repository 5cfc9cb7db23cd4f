"""Images of an earlier run in the store of a later one: found by id, copied once, in its plan's order.

An id is the digest of all that decides an image (prompt, seed, generator, settings), so a row of the
later plan that the earlier store holds need not be made. Nothing is decoded: of each range of the later
plan the encoded images are read from where they lie, by row groups, and written as the pack that making
them would have left. What the plan says of a row (its class, foremost) is the later plan's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ray_synth.generation.chunks import Holdings, look_up
from ray_synth.generation.store import IMAGE_SCHEMA, ImageStore, pack_name, part_name
from ray_synth.prompting.plan_file import PLAN_FILE, PLAN_SCHEMA, WINDOW, Plan, PlanFile
from ray_synth.storage.damage import damaged


@dataclass(frozen=True, eq=False)
class Sources:
    """Where the rows of a plan lie, in an earlier run's store and in its own.

    Attributes:
        held: a part for each row; -1 where it is nowhere.
        stores: of each of `held.names`.
        taken: rows that the earlier store has.
    """

    held: Holdings
    stores: list[ImageStore]
    taken: int

    @classmethod
    def of(cls, plan: Plan, earlier: ImageStore, own: ImageStore) -> Sources:
        """Look all rows up by their ids; nothing is written in either store."""
        rows = len(plan)
        held = Holdings([], np.full(rows, -1, np.int32), np.zeros(rows, np.int32))
        look_up(held, plan, earlier, set(earlier.parts()))
        stores, taken = [earlier] * len(held.names), int((held.part >= 0).sum())
        look_up(held, plan, own, set(own.parts()))
        return cls(held, stores + [own] * (len(held.names) - len(stores)), taken)

    @property
    def missing(self) -> int:
        return int((self.held.part < 0).sum())


def missing_rows_of(plan: PlanFile, sources: Sources) -> Iterator[pa.Table]:
    """The rows of a plan that lie nowhere, in its order: a plan of their own."""
    at = 0
    with plan.folder.open_table(PLAN_FILE) as file:
        for batch in file.iter_batches(WINDOW):
            lacking = sources.held.part[at : at + len(batch)] < 0
            at += len(batch)
            yield pa.Table.from_batches([batch]).cast(PLAN_SCHEMA).filter(pa.array(lacking))


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a part, and their places in a range of the plan."""

    store: ImageStore
    name: str
    rows: np.ndarray
    places: np.ndarray


@dataclass(frozen=True, eq=False)
class GatherTask:
    """Rows `start` to `stop` of a plan, to be written in its store as making them would have left them.

    Attributes:
        batch: rows of a part; 0: they are one pack.
    """

    plan: Plan
    store: ImageStore
    start: int
    stop: int
    pieces: tuple[Piece, ...]
    group_rows: int
    batch: int

    def run(self) -> None:
        """Write the parts that are not there.

        Raises:
            DamagedFile: a part of the earlier run cannot be read, or holds other rows than it did.
        """
        rows = pa.Table.from_pylist(self.plan.rows(self.start, self.stop), schema=PLAN_SCHEMA)
        ids = rows["sample_id"].to_pylist()
        size = self.batch or len(ids)
        spans = [slice(at, at + size) for at in range(0, len(ids), size)]
        names = [part_name(ids[span]) for span in spans]
        if not self.batch:
            names = [pack_name(ids, self.start)]
        todo = [place for place, name in enumerate(names) if not self.store.holds(name)]
        if not todo:
            return
        images = self._gathered(rows)
        for place in todo:
            table = images.slice(spans[place].start, size)
            if self.batch:
                self.store.folder.write_table(names[place], table)
            else:
                groups = range(0, len(table), self.group_rows)
                self.store.write_pack(
                    names[place], (table.slice(at, self.group_rows) for at in groups)
                )

    def _gathered(self, rows: pa.Table) -> pa.Table:
        """(rows of the range) by `IMAGE_SCHEMA`: of each piece only the row groups that it needs."""
        tables = []
        for piece in self.pieces:
            first, last = int(piece.rows.min()), int(piece.rows.max())
            table = piece.store.read_rows(piece.name, first, last + 1).take(piece.rows - first)
            wanted = rows["sample_id"].take(pa.array(piece.places))
            if not table["sample_id"].equals(wanted):
                address = piece.store.folder.address(piece.name)
                raise damaged(address, "it holds other images than it did")
            tables.append(_of_today(table))
        order = np.argsort(np.concatenate([piece.places for piece in self.pieces]))
        table = pa.concat_tables(tables).take(order)
        for field in PLAN_SCHEMA:
            at = IMAGE_SCHEMA.get_field_index(field.name)
            table = table.set_column(at, field, rows[field.name].combine_chunks())
        return table


def gather_tasks(
    plan: Plan, store: ImageStore, sources: Sources, *, rows: int, group: int, batch: int
) -> Iterator[GatherTask]:
    """A task for each range of `rows` of a plan that lies somewhere whole; the last may be shorter.

    Args:
        batch: rows of a part of the last one.
    """
    held = sources.held
    for start in range(0, len(plan), rows):
        stop = min(start + rows, len(plan))
        part, row = held.part[start:stop], held.row[start:stop]
        order = np.argsort(part, kind="stable")
        numbers, firsts = np.unique(part[order], return_index=True)
        pieces = tuple(
            Piece(sources.stores[number], held.names[number], row[places], places)
            for number, places in zip(
                numbers.tolist(), np.split(order, firsts[1:].tolist()), strict=True
            )
        )
        whole = stop - start == rows
        yield GatherTask(plan, store, start, stop, pieces, group, 0 if whole else batch)


def _of_today(table: pa.Table) -> pa.Table:
    """By `IMAGE_SCHEMA`: columns that an earlier version did not have are null."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in IMAGE_SCHEMA
    ]
    return pa.table(columns, schema=IMAGE_SCHEMA)
