"""Packs: small parts become large ones, under any kill, and every reader sees each row once."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from painting import Painter
from test_store import made, plan_rows
from tiny import embedded

from ray_synth.config import GenerationConfig, QualityConfig
from ray_synth.generation import packs
from ray_synth.generation.chunks import chunks_of, cut, holdings
from ray_synth.generation.maker import GenerationJob, ImageMaker
from ray_synth.generation.store import IMAGE_SCHEMA, ImageStore, pack_name, pack_range
from ray_synth.generation.stored import StoredRows
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
from ray_synth.storage.folder import Folder


def plan_of(rows) -> PlanTable:
    return PlanTable(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))


def pack(plan, store, batch, rows=8, group=2) -> int:
    """All that `stream.pack_all` does, without Ray."""
    written = 0
    while True:
        held = holdings(plan, store, batch)
        store.delete(held.stale)
        tasks = list(packs.packs_to_write(plan, store, held, rows, group))
        for task in tasks:
            task.run()
        written += len(tasks)
        if not tasks:
            return written


def ids_in(store) -> list[str]:
    return sorted(i for _, t in store.every(["sample_id"]) for i in t["sample_id"].to_pylist())


def test_the_default_sizes_follow_the_images():
    photo = GenerationConfig(width=512, height=512)
    assert (packs.pack_rows(photo), packs.group_rows(photo)) == (2048, 32)
    small = GenerationConfig(width=64, height=64)
    assert (packs.pack_rows(small), packs.group_rows(small)) == (16_384, 512)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.sets(st.integers(0, 20)),
    st.sets(st.integers(0, 20)), st.booleans(),
)  # fmt: skip
def test_whatever_was_made_packing_keeps_every_row_once(
    tmp_path_factory, count, size, other, first, second, foreign
):
    store = ImageStore(Folder(tmp_path_factory.mktemp("store")))
    rows = plan_rows(count)
    plan = plan_of(rows)
    written: set[str] = set()
    # A session with another batch size, packed, then one of this size: in part the same rows.
    for step, numbers in ((other, first), (size, second)):
        for number in numbers:
            batch = rows[number * step : (number + 1) * step]
            if batch:
                store.write(made(batch))
                written |= {row["sample_id"] for row in batch}
        pack(plan, store, step)
    if foreign:
        store.write(made([{**rows[0], "sample_id": "of another plan"}]))
    assert {i for i in ids_in(store) if i != "of another plan"} == written
    held = holdings(plan, store, size)
    assert {rows[i]["sample_id"] for i in np.flatnonzero(held.part >= 0)} == written
    for at in np.flatnonzero(held.part >= 0):
        table = store.read(held.names[held.part[at]], ["sample_id"])
        assert table["sample_id"][int(held.row[at])].as_py() == rows[at]["sample_id"]
    assert sum(c.missing for c in chunks_of(held, size)) == count - len(written)
    found = [row["sample_id"] for row in store.rows(plan.table, ["image"])]
    assert sorted(found) == sorted(written)


def test_a_whole_plan_lies_in_few_files_and_is_known_by_name(tmp_path, monkeypatch):
    store, rows = ImageStore(Folder(tmp_path)), plan_rows(44)
    plan = plan_of(rows)
    images = made(rows)
    for row in images[::5]:
        row["accepted"] = False
    for at in range(0, 44, 2):
        store.write(images[at : at + 2])
    assert pack(plan, store, 2, rows=16, group=4) == 2
    large = [name for name in store.parts() if pack_range(name)]
    assert sorted(map(pack_range, large)) == [(0, 16), (16, 32)]
    assert large == sorted(
        pack_name([row["sample_id"] for row in rows[at : at + 16]], at) for at in (0, 16)
    )
    assert len(store.parts()) == 2 + 6, "what is left over at the end stays as it is"
    for name in large:
        with pq.ParquetFile(tmp_path / name) as file:
            assert file.num_row_groups == 4
            start = pack_range(name)[0]
            assert file.read().to_pylist() == images[start : start + 16]
            assert store.accepted(name).tolist() == file.read()["accepted"].to_pylist()
    monkeypatch.setattr(ImageStore, "read", None)
    monkeypatch.setattr(ImageStore, "groups", None)
    chunks = cut(plan, store, 2)
    assert [chunk.missing for chunk in chunks] == [0] * 22
    # The same with another batch size, and as the start of a longer plan.
    longer = plan_of(plan_rows(60))
    store.delete([name for name in store.parts() if not pack_range(name)])
    assert sum(chunk.missing for chunk in cut(longer, store, 5)) == 60 - 32


def test_a_kill_before_the_small_parts_are_deleted_leaves_nothing_twice(tmp_path, monkeypatch):
    store, rows = ImageStore(Folder(tmp_path)), plan_rows(16)
    plan = plan_of(rows)
    for at in range(0, 16, 4):
        store.write(made(rows[at : at + 4]))
    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "delete", lambda self, names: None)
        next(packs.packs_to_write(plan, store, holdings(plan, store, 4), 8, 2)).run()
    assert len(store.parts()) == 5
    assert len(list(store.rows(plan.table, ["seed"]))) == 16
    assert all(len(chunk.parts) == 1 for chunk in cut(plan, store, 4))
    pack(plan, store, 4)
    assert len(store.parts()) == 2
    assert ids_in(store) == [row["sample_id"] for row in rows]


PACKING = """
import sys
sys.path[:0] = {paths!r}
from test_packs import *
store, plan = ImageStore(Folder({folder!r})), plan_of(plan_rows(4096))
print("ready", flush=True)
pack(plan, store, 4, rows=512, group=32)
print("done", flush=True)
"""


def test_packing_that_is_killed_again_and_again_ends_with_each_row_once(tmp_path):
    store, rows = ImageStore(Folder(tmp_path)), plan_rows(4096)
    for at in range(0, 4096, 4):
        store.write(made(rows[at : at + 4]))
    code = PACKING.format(paths=[p for p in sys.path if p], folder=str(tmp_path))
    killed, wait = 0, 0.05
    while True:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(wait)
        wait *= 1.5  # so that it comes to an end on any machine
        os.kill(process.pid, signal.SIGKILL)
        if "done" in process.communicate()[0]:
            break
        killed += 1
        chunks = cut(plan_of(rows), store, 4)
        assert sum(chunk.missing for chunk in chunks) == 0, "no row was lost on the way"
    assert killed >= 2
    store.folder.sweep()
    assert sorted(map(pack_range, store.parts())) == [(i, i + 512) for i in range(0, 4096, 512)]
    assert ids_in(store) == [row["sample_id"] for row in rows]


def test_two_who_pack_the_same_range_do_not_disturb_each_other(tmp_path):
    store, rows = ImageStore(Folder(tmp_path)), plan_rows(8)
    plan = plan_of(rows)
    for at in range(0, 8, 2):
        store.write(made(rows[at : at + 2]))
    first, second = (
        next(packs.packs_to_write(plan, store, holdings(plan, store, 2), 8, 2)) for _ in range(2)
    )
    assert first.run() == second.run()
    assert store.parts() == [first.run()]
    store.folder.delete(store.parts()[0])
    with pytest.raises(FileNotFoundError):
        second.run()


def test_readers_follow_images_that_are_packed_meanwhile(tmp_path):
    store, rows = ImageStore(Folder(tmp_path)), plan_rows(64)
    plan = plan_of(rows)
    for row in made(rows):
        store.write([row])
    seen = []
    for number, row in enumerate(store.rows(plan.table, ["image"])):
        seen.append(row["sample_id"])
        if number == 3:
            pack(plan, store, 1, rows=32)
    assert sorted(seen) == [row["sample_id"] for row in rows]


SMALL = GenerationConfig(
    generator="painting:Painter",
    width=16,
    height=16,
    batch_size=4,
    checks=QualityConfig(policy="off"),
)


class Told:
    """A packer's handle that notes what it is told."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.made = self

    def remote(self, start: int) -> None:
        self.starts.append(start)


def maker(store, rows, **job) -> ImageMaker:
    return ImageMaker(GenerationJob(SMALL, plan_of(rows), store, pack_rows=8, **job))


def test_a_maker_reads_packed_rows_and_makes_none_of_them_again(tmp_path, monkeypatch):
    store, rows = ImageStore(Folder(tmp_path)), plan_rows(20)
    told = Told()
    first = maker(store, rows, packer=told)
    expected = [row for at in range(0, 20, 4) for row in first.chunk(at, at + 4, [])]
    assert told.starts == [0, 4, 8, 12, 16]
    before = [chunk.parts for chunk in cut(plan_of(rows), store, 4)]
    assert pack(plan_of(rows), store, 4) == 2
    monkeypatch.setattr(Painter, "generate", None)
    # Parts as they were listed before, as they are now, and a task that is tried again.
    for parts in (before, [c.parts for c in cut(plan_of(rows), store, 4)], [()] * 5):
        again = maker(store, rows, packer=told)
        found = [
            row
            for at, names in zip(range(0, 20, 4), parts, strict=True)
            for row in again.chunk(at, at + 4, list(names))
        ]
        assert found == expected
    assert len(ids_in(store)) == 20


def test_rows_that_a_plan_moved_are_found_in_an_earlier_pack(tmp_path, monkeypatch):
    store, rows = ImageStore(Folder(tmp_path)), plan_rows(16)
    expected = maker(store, rows).chunk(0, 4, []) + maker(store, rows).chunk(4, 8, [])
    pack(plan_of(rows), store, 4)
    monkeypatch.setattr(Painter, "generate", None)
    moved = rows[8:12] + rows[:8]
    chunks = cut(plan_of(moved), store, 4)
    assert [chunk.missing for chunk in chunks] == [4, 0, 0]
    found = [r for c in chunks[1:] for r in maker(store, moved).chunk(c.start, c.stop, [*c.parts])]
    assert [row["image"] for row in found] == [row["image"] for row in expected]


def test_a_store_is_packed_beside_its_makers_and_at_the_end(local_ray, tmp_path, monkeypatch):
    from ray_synth.generation.stream import image_stream, make_images

    rows = plan_rows(44)
    store = ImageStore(Folder(tmp_path))
    config = embedded(generator="painting:Painter", generator_kwargs={"seconds": 0.2})
    job = GenerationJob(config, plan_of(rows), store, pack_rows=8)
    names: set[str] = set()
    for _ in image_stream(job, columns=["sample_id"]).iter_batches(batch_size=None):
        names |= set(store.parts())
    deadline = time.monotonic() + 60
    while not any(pack_range(name) for name in names):
        assert time.monotonic() < deadline, "nothing was packed beside the makers"
        time.sleep(0.1)
        names |= set(store.parts())
    assert make_images(job) == 0
    large = sorted(filter(None, map(pack_range, store.parts())))
    assert large == [(at, at + 8) for at in range(0, 40, 8)]
    assert len(store.parts()) == 6, "and the batch at the end of the plan"
    assert ids_in(store) == [row["sample_id"] for row in rows]


def test_a_finished_store_is_told_in_a_few_runs(tmp_path):
    store, rows = ImageStore(Folder(tmp_path)), plan_rows(44)
    plan, images = plan_of(rows), made(rows)
    refused = {3, 4, 17, 33, 43}
    for at in refused:
        images[at]["accepted"] = False
    for at in range(0, 44, 2):
        store.write(images[at : at + 2])
    pack(plan, store, 2, rows=16, group=4)
    found = StoredRows.of(holdings(plan, store, 2), store, 40, 4)
    assert len(found.runs) == 2 + 4
    assert found.counts(8).tolist() == [6, 8, 7, 8, 7]
    for start, stop in ((0, 40), (3, 5), (14, 35), (39, 40)):
        ids = [row["sample_id"] for row in found.read(start, stop, ["sample_id"])]
        assert ids == [rows[at]["sample_id"] for at in range(start, stop) if at not in refused]
    store.folder.delete(store.parts()[0])
    with pytest.raises(ValueError, match="images are not in .*run `ray-synth generate`"):
        StoredRows.of(holdings(plan, store, 2), store, 44, 4)


def test_a_pack_has_the_schema_and_notes_what_was_rejected(tmp_path):
    store, rows = ImageStore(Folder(tmp_path)), plan_rows(8)
    images = made(rows)
    images[5]["accepted"] = False
    store.write(images)
    pack(plan_of(rows), store, 8)
    with pq.ParquetFile(tmp_path / store.parts()[0]) as file:
        assert file.schema_arrow.remove_metadata() == IMAGE_SCHEMA
        assert json.loads(file.metadata.metadata[b"rejected"]) == [5]
