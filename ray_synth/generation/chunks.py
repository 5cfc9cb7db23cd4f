"""A plan cut into chunks of one generator batch each, and which of them the store lacks. No Ray.

Chunks lie at fixed places of the plan, so that whoever makes a chunk, and however often, writes the same
part. A finished chunk is known by its part's name alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

from ray_synth.generation.store import ImageStore, part_name
from ray_synth.prompting.plan_file import Plan


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of a plan; `parts` of the store hold all, some or none of them."""

    start: int
    stop: int
    parts: tuple[str, ...]
    missing: int


def cut(plan: Plan, store: ImageStore, batch_size: int) -> list[Chunk]:
    """All chunks of a plan, with what the store has of them.

    The store is listed once. Files are opened only where parts are not chunks of this plan: they were
    made with another batch size, or for an earlier plan, and their rows are looked up by id.
    """
    listed = set(store.parts())
    names = [part_name(ids) for ids in plan.ids(batch_size)]
    others = listed.difference(names)
    elsewhere = store.locate(others) if others else {}
    ids_of = plan.ids(batch_size) if elsewhere else repeat([])
    rows, chunks = len(plan), []
    for number, (name, ids) in enumerate(zip(names, ids_of, strict=False)):
        start = number * batch_size
        stop = min(start + batch_size, rows)
        if name in listed:
            chunks.append(Chunk(start, stop, (name,), 0))
        else:
            found = [elsewhere[i] for i in ids if i in elsewhere]
            chunks.append(Chunk(start, stop, tuple(sorted(set(found))), stop - start - len(found)))
    return chunks


def missing_rows(chunks: list[Chunk]) -> int:
    return sum(chunk.missing for chunk in chunks)
