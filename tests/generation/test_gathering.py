"""Images of an earlier run in a later one's store: each once, in the later plan's order and classes."""

import numpy as np
import pyarrow as pa
import pytest
from test_packs import ids_in, pack, plan_of
from test_store import made

from ray_synth.generation import gathering
from ray_synth.generation.chunks import cut, holdings
from ray_synth.generation.gathering import Sources, gather_tasks, missing_rows_of
from ray_synth.generation.store import ImageStore, pack_range
from ray_synth.prompting.contexts import Context
from ray_synth.prompting.plan import ClassPrompts, make_plan
from ray_synth.prompting.plan_file import PLAN_FILE, PLAN_SCHEMA, PlanFile
from ray_synth.storage.damage import DamagedFile
from ray_synth.storage.folder import Folder

SETTINGS = {
    "mix": {"plain": 0.5, "contextual": 0.5}, "styles": (), "negative_prompt": "", "fingerprint": "g",
    "seed": 3, "count_tokens": lambda text: len(text.split()), "max_tokens": 60,
}  # fmt: skip
SCENES = [(Context(background="on a lawn"), "llm"), (Context(lighting="at dusk"), "pool")]
EARLIER = [ClassPrompts(at, name, f"a {name}", SCENES) for at, name in enumerate("bdfh")]
# "d" is gone, "f" is called "x" now, "a" and "z" are new.
LATER = [
    ClassPrompts(0, "a", "a thing", SCENES, number=4),
    ClassPrompts(1, "b", "a b", SCENES, number=0),
    ClassPrompts(2, "h", "a h", SCENES, number=3),
    ClassPrompts(3, "x", "a f", SCENES, number=2, said="f"),
    ClassPrompts(4, "z", "a z", SCENES, number=5),
]
EACH, BATCH, ROWS, GROUP = 8, 3, 12, 4


@pytest.fixture
def earlier(tmp_path):
    """A packed store of the earlier classes, and its rows by id."""
    store = ImageStore(Folder(tmp_path / "earlier" / "images"))
    plan = make_plan(EARLIER, num_images=EACH * len(EARLIER), **SETTINGS)
    rows = made(plan.to_pylist())
    for at, row in enumerate(rows):
        row |= {"image": f"picture {at}".encode(), "accepted": at % 5 != 0}
    for at in range(0, len(rows), BATCH):
        store.write(rows[at : at + BATCH])
    assert pack(plan_of(plan.to_pylist()), store, BATCH, rows=10, group=2) > 1
    return store, {row["sample_id"]: row for row in rows}


@pytest.fixture
def later(tmp_path):
    """The later plan in its folder, and an empty store."""
    folder = Folder(tmp_path / "later")
    plan = make_plan(LATER, num_images=EACH * len(LATER), **SETTINGS)
    folder.write_tables(PLAN_FILE, PLAN_SCHEMA, [plan])
    return PlanFile(folder), ImageStore(folder.child("images"))


def make_missing(plan, store, sources) -> list[dict]:
    rows = [row for table in missing_rows_of(plan, sources) for row in table.to_pylist()]
    for at in range(0, len(rows), BATCH):
        store.write(made(rows[at : at + BATCH]))
    return rows


def tasks_of(plan, store, sources):
    return list(gather_tasks(plan, store, sources, rows=ROWS, group=GROUP, batch=BATCH))


def test_kept_classes_keep_the_ids_of_their_rows_wherever_they_stand(earlier, later):
    _, known = earlier
    rows = later[0].rows(0, len(later[0]))
    kept = {row["sample_id"] for row in rows if row["class_name"] in ("b", "h", "x")}
    assert kept == {row["sample_id"] for row in known.values() if row["class_name"] in "bhf"}
    assert not {row["sample_id"] for row in rows if row["class_name"] in "az"} & set(known)
    assert {row["prompt"] for row in rows if row["class_name"] == "x"} == {
        row["prompt"] for row in known.values() if row["class_name"] == "f"
    }


def test_only_what_is_new_is_made_and_all_lies_as_the_plan_has_it(earlier, later):
    store_before, known = earlier
    plan, store = later
    parts = {n: store_before.folder.read_bytes(n) for n in store_before.parts()}
    sources = Sources.of(plan, store_before, store)
    assert (sources.taken, sources.missing) == (3 * EACH, 2 * EACH)
    new = make_missing(plan, store, sources)
    assert {row["class_name"] for row in new} == {"a", "z"}
    assert len(new) == 2 * EACH
    sources = Sources.of(plan, store_before, store)
    assert (sources.taken, sources.missing) == (3 * EACH, 0)
    for task in tasks_of(plan, store, sources):
        task.run()
    held = holdings(plan, store, BATCH)
    store.delete(held.stale)
    planned = plan.rows(0, len(plan))
    assert ids_in(store) == sorted(row["sample_id"] for row in planned), "each once"
    packs = [name for name in store.parts() if pack_range(name)]
    assert sorted(map(pack_range, packs)) == [(0, 12), (12, 24), (24, 36)]
    assert all(chunk.missing == 0 and len(chunk.parts) == 1 for chunk in cut(plan, store, BATCH))
    columns = [*PLAN_SCHEMA.names[1:], "image", "accepted"]
    ids = pa.chunked_array([[row["sample_id"] for row in planned]])
    for row, wanted in zip(store.table(ids, columns).to_pylist(), planned, strict=True):
        assert {key: row[key] for key in wanted} == wanted, "its class is the later plan's"
        if before := known.get(row["sample_id"]):
            assert (row["image"], row["accepted"]) == (before["image"], before["accepted"])
    for name in packs:
        accepted = store.read(name, ["accepted"])["accepted"].to_numpy()
        assert np.array_equal(store.accepted(name), accepted)
        assert store.group_sizes(name) == [4, 4, 4]
    assert {n: store_before.folder.read_bytes(n) for n in store_before.parts()} == parts
    assert store_before.folder.child("damaged").names() == []


def test_what_a_kill_left_is_gone_on_from(earlier, later, monkeypatch):
    store_before, _ = earlier
    plan, store = later
    new = make_missing(plan, store, Sources.of(plan, store_before, store))
    sources = Sources.of(plan, store_before, store)
    tasks = tasks_of(plan, store, sources)
    tasks[0].run()
    tasks[-1].run()
    there = {n: store.folder.read_bytes(n) for n in store.parts()}
    again = Sources.of(plan, store_before, store)
    assert (again.taken, again.missing) == (sources.taken, 0), "counted as before"
    assert sum(len(t) for t in missing_rows_of(plan, again)) == 0
    read = []
    real = gathering.GatherTask._gathered
    monkeypatch.setattr(
        gathering.GatherTask, "_gathered", lambda self, rows: read.append(1) or real(self, rows)
    )
    for task in tasks_of(plan, store, again):
        task.run()
    assert len(read) == len(tasks) - 2, "what is there is not copied again"
    store.delete(holdings(plan, store, BATCH).stale)
    assert there.items() >= {n: store.folder.read_bytes(n) for n in there if store.holds(n)}.items()
    assert len(ids_in(store)) == len(plan) == len(set(ids_in(store)))
    assert len(new) == 2 * EACH


def test_a_store_that_changes_meanwhile_is_named(earlier, later):
    store_before, _ = earlier
    plan, store = later
    make_missing(plan, store, Sources.of(plan, store_before, store))
    task = tasks_of(plan, store, Sources.of(plan, store_before, store))[0]
    piece = next(piece for piece in task.pieces if piece.store.folder.uri != store.folder.uri)
    table = store_before.read(piece.name)
    store_before.folder.write_table(piece.name, table.take(list(range(len(table)))[::-1]))
    with pytest.raises(DamagedFile, match=piece.name):
        task.run()
    assert not any(pack_range(name) for name in store.parts()), "nothing half written"
