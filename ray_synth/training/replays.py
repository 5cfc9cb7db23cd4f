"""Images of a store that is still growing, for the live feed to draw again: all that was made so far."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from ray_synth.generation.store import ImageStore, pack_range
from ray_synth.prompting.plan_file import WINDOW, Plan
from ray_synth.prompting.plan_index import PlanIndex
from ray_synth.storage.damage import DamagedFile
from ray_synth.training.decoder import Row

log = logging.getLogger("ray_synth")
COLUMNS = ["sample_id", "image", "class_index", "accepted"]
READERS = 8  # row groups, or small parts, that are read at once
LIST_AGAIN_S = 60.0
EMPTY_S = 1.0  # before another look at a store that had nothing
Unit = tuple[str, int, int]  # a part, and rows of it


def replayed(
    store: ImageStore, plan: Plan, num_rows: int, seed: int, *, list_again_s: float = LIST_AGAIN_S
) -> Iterator[Row]:
    """Accepted rows of the plan's first `num_rows` that are in the store, endlessly.

    In passes: each gives every row once, in shuffled order, those that come into the store meanwhile
    included (it is listed again now and then). Parts are taken in a shuffled order, and of large ones
    the row groups; the plan mixes all classes, so each of them does. Holds `READERS` row groups, and
    13 bytes per row of the plan.
    """
    rng = np.random.default_rng(seed)
    index = PlanIndex(plan.ids(WINDOW))
    with ThreadPoolExecutor(READERS, thread_name_prefix="replays") as pool:
        while True:
            seen = np.zeros(len(index), bool)
            seen[num_rows:] = True  # not to be trained on
            ahead: deque[Future[pa.Table | None]] = deque()
            units = _units(store, rng, list_again_s)
            while True:
                for unit in units:
                    ahead.append(pool.submit(_read, store, *unit))
                    if len(ahead) == READERS:
                        break
                if not ahead:
                    break
                table = ahead.popleft().result()
                if table is not None:
                    yield from _new_rows(table, index, seen, rng)
            if not seen[:num_rows].any():
                time.sleep(EMPTY_S)


def _units(store: ImageStore, rng: np.random.Generator, list_again_s: float) -> Iterator[Unit]:
    """What to read in one pass, until a listing shows nothing new."""
    read: set[str] = set()
    todo: list[str] = []
    listed = -np.inf
    while True:
        if not todo or time.monotonic() - listed > list_again_s:
            todo = [name for name in store.parts() if name not in read]
            rng.shuffle(todo)
            listed = time.monotonic()
            if not todo:
                return
        name = todo.pop()
        read.add(name)
        span = pack_range(name)
        if span is None:
            yield name, 0, WINDOW
            continue
        try:
            sizes = store.group_sizes(name)
        except DamagedFile as error:
            log.warning("not replayed: %s", error)
            continue
        ends = np.cumsum(sizes)
        for group in rng.permutation(len(sizes)).tolist():
            yield name, int(ends[group]) - sizes[group], int(ends[group])


def _read(store: ImageStore, name: str, start: int, stop: int) -> pa.Table | None:
    try:
        return store.read_rows(name, start, stop, COLUMNS)
    except FileNotFoundError:  # packed since it was listed: the pack will be
        return None
    except (
        DamagedFile
    ) as error:  # made again by the stage of generation, which looks for such files
        log.warning("not replayed: %s", error)
        return None


def _new_rows(
    table: pa.Table, index: PlanIndex, seen: np.ndarray, rng: np.random.Generator
) -> Iterator[Row]:
    positions = index.positions(table["sample_id"].to_pylist())
    new = (positions >= 0) & table["accepted"].to_numpy()
    new[new] = ~seen[positions[new]]
    seen[positions[new]] = True
    rows = table.filter(pa.array(new)).to_pylist()
    yield from (rows[at] for at in rng.permutation(len(rows)))
