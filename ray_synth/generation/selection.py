"""Slices of a run's images: by class, kind, style, id, accepted or not. Exports and sheets draw on it.

The small columns of all parts in, as one table; the rows of a slice out, part by part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.errors import UserError, nearest, shortened
from ray_synth.generation.store import IMAGE_SCHEMA, ImageStore
from ray_synth.prompting.plan_file import PLAN_FILE, WINDOW, PlanFile
from ray_synth.prompting.plan_index import PlanIndex
from ray_synth.storage.folder import Folder

FACTS = ["sample_id", "class_index", "class_name", "kind", "style"]
FACTS += ["accepted", "reject_reason", "generator", "gpu_seconds"]
NAMES_SHOWN = 20  # in an error


def scan(folder: Folder) -> pa.Table:
    """What is known of each made image of a run's plan, without its picture; each image once.

    Returns:
        `FACTS`, `part` (the file that holds the row) and `rank` (int64, the position in the plan),
        in the order of the store. Repeated text is dictionary-encoded: a million rows are about
        100 MB.

    Raises:
        UserError: the folder holds no plan, or none of its images was made.
    """
    if not folder.exists(PLAN_FILE):
        raise UserError(
            f"{folder.address()} holds no plan.parquet; give the directory of a run, such as "
            "runs/quickstart"
        )
    index = PlanIndex(PlanFile(folder).ids(WINDOW))
    store = ImageStore(folder.child("images"))
    tables, ranks = [], [np.empty(0, np.int64)]
    for name, table in store.every(FACTS):
        positions = index.positions(table["sample_id"].to_pylist())
        planned = positions >= 0
        tables.append(_facts(name, table.filter(pa.array(planned))))
        ranks.append(positions[planned])
    rank = np.concatenate(ranks)
    if not len(rank):
        raise UserError(
            f"{folder.address()} holds no images of its plan yet; run `ray-synth generate`"
        )
    table = pa.concat_tables(tables).append_column("rank", pa.array(rank))
    _, first = np.unique(rank, return_index=True)  # a row in two parts counts in the first
    return table.take(np.sort(first)).unify_dictionaries().combine_chunks()


def _facts(name: str, table: pa.Table) -> pa.Table:
    table = table.append_column("part", pa.array([name] * table.num_rows, pa.string()))
    for at, field in enumerate(table.schema):
        if field.type == pa.string() and field.name != "sample_id":
            table = table.set_column(at, field.name, table[field.name].dictionary_encode())
    accepted = pc.fill_null(table["accepted"], False)
    return table.set_column(table.schema.get_field_index("accepted"), "accepted", accepted)


def choose(
    facts: pa.Table,
    *,
    class_names: Collection[str] | None = None,
    kinds: Collection[str] | None = None,
    styles: Collection[str] | None = None,
    sample_ids: Collection[str] | None = None,
    rejected: bool | None = None,
    limit: int | None = None,
) -> pa.Table:
    """The rows of `scan`'s table that fit, in the same order.

    Args:
        class_names: any of these; None or empty: all. So for `kinds`, `styles` and `sample_ids`.
        rejected: only rejected images, or only accepted ones; None: both.
        limit: at most so many, the first ones of the plan: those are balanced over the classes.

    Raises:
        UserError: a value that does not occur, or nothing that fits; says what there is.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: give 1 or more")
    slices = {"class_name": class_names, "kind": kinds, "style": styles, "sample_id": sample_ids}
    asked = []
    chosen = facts
    for column, values in slices.items():
        if not values:
            continue
        _check_known(facts, column, values)
        asked.append(f"{_label(column)} {shortened(list(values), NAMES_SHOWN)}")
        mask = pc.is_in(chosen[column].cast(pa.string()), value_set=pa.array(sorted(set(values))))
        chosen = chosen.filter(mask)
    there = chosen
    if rejected is not None:
        asked.append("rejected" if rejected else "accepted")
        mask = pc.invert(chosen["accepted"]) if rejected else chosen["accepted"]
        chosen = chosen.filter(mask)
    if chosen.num_rows == 0:
        there = there if there.num_rows else facts
        raise UserError(f"no images with {', '.join(asked)}; there are {_inventory(there)}")
    if limit is not None and limit < chosen.num_rows:
        last = np.partition(chosen["rank"].to_numpy(), limit - 1)[limit - 1]
        chosen = chosen.filter(pc.less_equal(chosen["rank"], pa.scalar(last)))
    return chosen


def read_chosen(
    folder: Folder, chosen: pa.Table, columns: list[str] | None = None
) -> Iterator[list[dict[str, Any]]]:
    """The rows of a slice with their pictures: one list per row group that has any, parts in the
    order of the slice.

    Args:
        chosen: from `choose`.
        columns: default: all of `IMAGE_SCHEMA`.
    """
    store = ImageStore(folder.child("images"))
    wanted: dict[str, set[str]] = {}
    for sample_id, part in zip(
        chosen["sample_id"].to_pylist(), chosen["part"].to_pylist(), strict=True
    ):
        wanted.setdefault(part, set()).add(sample_id)
    names = list(dict.fromkeys(["sample_id", *(columns or IMAGE_SCHEMA.names)]))
    for part, ids in wanted.items():
        for table in store.groups(part, names, ids=ids):
            yield table.to_pylist()


def count_by(table: pa.Table, *columns: str) -> dict[Any, int]:
    """How many rows have each value of a column, or each combination of several; most first."""
    found = table.select(list(columns)).group_by(list(columns)).aggregate([([], "count_all")])
    keys = [found[column].to_pylist() for column in columns]
    pairs = zip(zip(*keys, strict=True), found["count_all"].to_pylist(), strict=True)
    ordered = sorted(pairs, key=lambda pair: (-pair[1], [str(value) for value in pair[0]]))
    return {(key if len(columns) > 1 else key[0]): count for key, count in ordered}


def _check_known(facts: pa.Table, column: str, values: Collection[str]) -> None:
    present = pc.unique(facts[column]).to_pylist()
    unknown = [value for value in values if value not in set(present)]
    if not unknown:
        return
    known = [value for value in present if value]
    near = nearest(unknown[0], known)
    hint = f"did you mean {near[0]!r}? " if near else ""
    there = shortened(sorted(known), NAMES_SHOWN)
    raise UserError(f"no image has {_label(column)} {unknown[0]!r}; {hint}there are {there}")


def _inventory(table: pa.Table) -> str:
    """`4 cat, 2 dog; 6 plain; 5 accepted, 1 rejected`."""
    accepted = count_by(table, "accepted")
    states = {"accepted": accepted.get(True, 0), "rejected": accepted.get(False, 0)}
    counts = [count_by(table, "class_name"), count_by(table, "kind"), states]
    return "; ".join(
        shortened([f"{count} {value}" for value, count in c.items() if count], NAMES_SHOWN)
        for c in counts
    )


def _label(column: str) -> str:
    return {"class_name": "class", "sample_id": "sample id"}.get(column, column)
