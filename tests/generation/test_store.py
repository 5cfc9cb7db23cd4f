"""The store: parts are whole, named by content, and joined back to the plan."""

import time

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import encoded

from ray_synth.generation.store import IMAGE_SCHEMA, ImageStore, part_name
from ray_synth.prompting.plan_file import PLAN_SCHEMA
from ray_synth.storage.folder import Folder


def plan_rows(count: int) -> list[dict]:
    return [
        {
            "sample_id": f"{i:06d}",
            "class_index": i % 3,
            "class_name": f"c{i % 3}",
            "meaning": "",
            "kind": "plain",
            "style": "",
            "prompt": f"a photo of {i}",
            "negative_prompt": "",
            "context_source": "none",
            "seed": i,
            "reference": "",
        }
        for i in range(count)
    ]


def made(rows: list[dict]) -> list[dict]:
    facts = {
        "image": encoded(0),
        "width": 24,
        "height": 20,
        "clip_score": None,
        "embedding": None,
        "accepted": True,
        "reject_reason": "",
        "attempt": 0,
        "generator": "{}",
        "gpu_seconds": 0.1,
    }
    return [{**row, **facts} for row in rows]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=8), st.randoms())
def test_made_and_missing_always_add_up_to_the_plan(tmp_path_factory, sizes, random):
    store = ImageStore(Folder(tmp_path_factory.mktemp("store")))
    rows = plan_rows(20)
    plan = pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)
    written: set[str] = set()
    for size in sizes:
        batch = random.sample(rows, size)
        store.write(made(batch))
        written |= {row["sample_id"] for row in batch}
    assert set(store.locate()) == written
    found = [row["sample_id"] for row in store.rows(plan, ["seed"])]
    assert sorted(found) == sorted(written), "each made row once, although parts may overlap"
    table = store.table(plan["sample_id"], ["seed"])
    assert sorted(table["sample_id"].to_pylist()) == sorted(written)
    assert dict(zip(table["sample_id"].to_pylist(), table["seed"].to_pylist(), strict=True)) == {
        row["sample_id"]: row["seed"] for row in rows if row["sample_id"] in written
    }


def test_a_batch_written_twice_is_one_part(tmp_path):
    store = ImageStore(Folder(tmp_path))
    batch = made(plan_rows(4))
    assert store.write(batch) == store.write(batch) == part_name([r["sample_id"] for r in batch])
    assert len(store.parts()) == 1
    assert store.read(store.parts()[0]).schema == IMAGE_SCHEMA


def test_rows_of_another_plan_are_passed_over(tmp_path):
    store = ImageStore(Folder(tmp_path))
    store.write(made(plan_rows(6)))
    plan = pa.Table.from_pylist(plan_rows(2), schema=PLAN_SCHEMA)
    assert len(list(store.rows(plan, ["prompt"]))) == 2


def test_a_half_written_part_is_not_there(tmp_path):
    store = ImageStore(Folder(tmp_path))
    (tmp_path / ".part-abc.parquet.1234.tmp").write_bytes(b"PAR1")
    assert store.parts() == []
    started = time.monotonic()
    with pytest.raises(FileNotFoundError):
        store.read("part-abc.parquet")
    assert time.monotonic() - started < 5, "what is missing is not waited for"
