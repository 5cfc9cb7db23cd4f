"""Damaged parts of a store count as missing, are named and kept aside; their images are made again."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from painting import Painter
from test_packs import pack, plan_of
from test_store import made, plan_rows

from ray_synth.config import GenerationConfig
from ray_synth.errors import UserError
from ray_synth.export.layouts import export_images
from ray_synth.generation import checking, packs
from ray_synth.generation.checking import CHECKED, good_parts, suspects
from ray_synth.generation.chunks import cut, holdings, missing_rows
from ray_synth.generation.maker import GenerationJob, ImageMaker
from ray_synth.generation.packs import PackTask
from ray_synth.generation.regenerate import regenerate
from ray_synth.generation.selection import scan
from ray_synth.generation.store import IMAGE_SCHEMA, ImageStore, pack_range
from ray_synth.generation.stored import StoredRows
from ray_synth.generation.stream import pack_all
from ray_synth.report.status import read_status
from ray_synth.storage.damage import DamagedFile
from ray_synth.storage.folder import Folder

assert Painter


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[data.find(b"IDAT") + 40 if at is None else at] ^= 0x10  # in a picture
    path.write_bytes(data)


def foreign(path):
    pq.write_table(pa.table({"n": [1, 2]}), path)


def other_rows(path):
    pq.write_table(pa.Table.from_pylist(made(plan_rows(9)[8:]), schema=IMAGE_SCHEMA), path)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
    "flipped in the footer": lambda path: flip(path, path.stat().st_size - 6),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a picture": lambda path: path.write_bytes(made(plan_rows(1))[0]["image"]),
    "a foreign table": foreign,
    "other rows": other_rows,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_part_is_missing_named_and_kept_aside(tmp_path, kind, caplog):
    store, plan = ImageStore(Folder(tmp_path)), plan_of(plan_rows(8))
    names = [store.write(made(plan_rows(8)[at : at + 2])) for at in range(0, 8, 2)]
    DAMAGES[kind](tmp_path / names[1])
    damaged = (tmp_path / names[1]).read_bytes()
    assert suspects(store) == [names[1]]
    assert len(store.parts()) == 4, "a look changes nothing"
    with caplog.at_level(logging.WARNING, "ray_synth"):
        chunks = cut(plan, store, 2)
    assert [chunk.missing for chunk in chunks] == [0, 2, 0, 0]
    assert names[1] in caplog.text
    assert (tmp_path / "damaged" / names[1]).read_bytes() == damaged
    assert store.set_aside() == [names[1]]
    store.write(made(plan_rows(4)[2:]))
    assert missing_rows(cut(plan, store, 2)) == 0
    assert suspects(store) == []


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 0.999), st.integers(0, 7))
def test_a_bit_that_flips_anywhere_costs_one_part_at_most(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("flips")
    store, plan = ImageStore(Folder(path)), plan_of(plan_rows(4))
    names = [store.write(made(plan_rows(4)[at : at + 2])) for at in (0, 2)]
    data = bytearray((path / names[0]).read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    (path / names[0]).write_bytes(data)
    left = missing_rows(cut(plan, store, 2))
    assert left in (0, 2)
    if not left:  # a bit that says nothing, such as one of the writer's name
        rows = [row for name in names for row in store.read(name).to_pylist()]
        assert rows == made(plan_rows(4))


def test_what_was_found_good_is_remembered_by_size_and_time(tmp_path, monkeypatch):
    store = ImageStore(Folder(tmp_path))
    names = sorted(store.write(made(plan_rows(8)[at : at + 2])) for at in range(0, 8, 2))
    assert good_parts(store) == names
    opened = []
    open_table = Folder.open_table
    monkeypatch.setattr(
        Folder, "open_table", lambda self, name: opened.append(name) or open_table(self, name)
    )
    assert good_parts(store) == names
    assert opened == [CHECKED]
    flip(tmp_path / names[2])
    (tmp_path / CHECKED).write_bytes(b"no table")
    assert good_parts(store) == [names[0], names[1], names[3]]


def packed(tmp_path, count=16):
    """A plan in one pack of 4 row groups."""
    store, plan = ImageStore(Folder(tmp_path)), plan_of(plan_rows(count))
    for at in range(0, count, 2):
        store.write(made(plan_rows(count)[at : at + 2]))
    assert pack(plan, store, 2, rows=count, group=4) == 1
    (name,) = store.parts()
    return store, plan, name


@pytest.mark.parametrize("kind", [k for k in DAMAGES if k != "flipped"])
def test_of_a_large_store_footers_tell_what_is_damaged(tmp_path, kind, monkeypatch):
    store, plan, name = packed(tmp_path)
    monkeypatch.setattr(checking, "READ_WHOLE_BYTES", 0)
    DAMAGES[kind](tmp_path / name)
    assert missing_rows(cut(plan, store, 2)) == 16


def test_a_bit_flipped_in_a_large_store_is_found_when_it_is_read_and_told_to_the_next_stage(
    tmp_path, monkeypatch
):
    store, plan, name = packed(tmp_path)
    monkeypatch.setattr(checking, "READ_WHOLE_BYTES", 0)
    flip(tmp_path / name)
    held = holdings(plan, store, 2)
    assert (held.part >= 0).all(), "footers know nothing of it"
    found = StoredRows.of(held, store, 16, 4)
    with pytest.raises(DamagedFile, match=name) as error:
        list(found.read(0, 16, IMAGE_SCHEMA.names))
    assert "set aside" in str(error.value)
    assert suspects(store) == [name]
    assert missing_rows(cut(plan, store, 2)) == 16
    assert store.set_aside() == [name]
    assert store.suspected() == []


def test_a_part_found_damaged_while_it_is_packed_is_set_aside(tmp_path):
    store, plan = ImageStore(Folder(tmp_path)), plan_of(plan_rows(8))
    names = [store.write(made(plan_rows(8)[at : at + 2])) for at in range(0, 8, 2)]
    flip(tmp_path / names[2])
    assert PackTask(plan, store, 0, 8, tuple(names), 4).run() == ""
    assert store.set_aside() == [names[2]]
    assert sorted(store.parts()) == sorted(set(names) - {names[2]})


def painted(tmp_path):
    config = GenerationConfig.model_validate(
        {"generator": "painting:Painter", "width": 16, "height": 16, "image_format": "png",
         "batch_size": 4, "checks": {"policy": "off"}}
    )  # fmt: skip
    store, plan = ImageStore(Folder(tmp_path)), plan_of(plan_rows(8))
    return ImageMaker(GenerationJob(config, plan, store, pack_rows=8)), store, plan


@pytest.mark.parametrize("large", [False, True])
def test_a_maker_makes_again_what_it_finds_damaged(tmp_path, large):
    maker, store, plan = painted(tmp_path)
    whole = [row["image"] for start in (0, 4) for row in maker.chunk(start, start + 4, [])]
    if large:
        assert pack(plan, store, 4, rows=8, group=4) == 1
    names = store.parts()
    for name in names:
        flip(tmp_path / name)
    maker, _, _ = painted(tmp_path)
    parts = {0: names, 4: names} if large else {0: [names[0]], 4: [names[1]]}
    again = [
        row["image"] for start in (0, 4) for row in maker.chunk(start, start + 4, parts[start])
    ]
    assert again == whole
    assert set(store.set_aside()) == set(names)
    assert missing_rows(cut(plan, store, 4)) == 0


def test_verbs_that_look_name_the_file(tmp_path):
    from test_regenerate import PAINTED, run_of

    run = run_of(tmp_path, PAINTED, plan_rows(8), checks={"policy": "off"})
    from ray_synth.prompting.plan_file import PLAN_SCHEMA

    run.write_table("plan.parquet", pa.Table.from_pylist(plan_rows(8), schema=PLAN_SCHEMA))
    name = ImageStore(run.child("images")).parts()[0]
    (tmp_path / "run" / "images" / name).write_bytes(b"PAR1 and no more")
    verbs = {
        "show": lambda: scan(run),
        "export": lambda: export_images(run, tmp_path / "out", layout="imagefolder"),
        "regenerate": lambda: regenerate(run, "000001"),
    }
    for verb in verbs.values():
        with pytest.raises(UserError, match=rf"images/{name} is damaged.*again: the file is set"):
            verb()
    status = read_status(run)
    assert [part for part in status.damaged if name in part]
    (tmp_path / "run" / "plan.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"plan.parquet is damaged .*--force-stage plan"):
        scan(run)
    assert "plan.parquet" in " ".join(read_status(run).damaged)


def test_a_pack_that_says_nothing_of_what_is_rejected_is_no_pack(tmp_path):
    store, plan, name = packed(tmp_path)
    table = pq.read_table(tmp_path / name)
    pq.write_table(table, tmp_path / name)
    assert pack_range(name) == (0, 16)
    assert missing_rows(cut(plan, store, 2)) == 16
    assert np.array_equal(holdings(plan, store, 2).part, np.full(16, -1))


def test_what_was_packed_is_not_missed_when_the_stage_is_done(tmp_path, monkeypatch):
    store, plan = ImageStore(Folder(tmp_path)), plan_of(plan_rows(20))
    for at in range(0, 20, 3):  # batches that lie in two ranges
        store.write(made(plan_rows(20)[at : at + 3]))
    config = GenerationConfig(batch_size=3, compile=False)
    monkeypatch.setattr(packs, "write_packs", lambda tasks: len([task.run() for task in tasks]))
    job = GenerationJob(config, plan, store, pack_rows=8)
    assert pack_all(job) == 2
    assert sorted(filter(None, map(pack_range, store.parts()))) == [(0, 8), (8, 16)]
    assert suspects(store) == []
    (tmp_path / store.parts()[0]).unlink()
    assert len(suspects(store)) == 1
