"""Chunks of a plan: at fixed places, and done as the store's listing says."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import made, plan_rows

from ray_synth.generation.chunks import cut, missing_rows
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import chunk_blocks
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanFile, PlanTable
from ray_synth.storage.folder import Folder


def table(count):
    return pa.Table.from_pylist(plan_rows(count), schema=PLAN_SCHEMA)


@pytest.fixture(params=["table", "file"])
def plan_of(request, tmp_path):
    def build(count):
        if request.param == "table":
            return PlanTable(table(count))
        Folder(tmp_path).write_table("plan.parquet", table(count))
        return PlanFile(Folder(tmp_path))

    return build


@pytest.mark.parametrize("count", [1, 7, 20_000])
def test_a_plan_gives_its_ids_and_rows_by_position(plan_of, count):
    plan, rows = plan_of(count), plan_rows(count)
    assert len(plan) == count
    ids = [i for part in plan.ids(6) for i in part]
    assert ids == [row["sample_id"] for row in rows]
    assert [len(part) for part in plan.ids(6)][:-1] == [6] * (-(-count // 6) - 1)
    for start in (0, count // 2, max(0, count - 3), 0):
        assert plan.rows(start, min(start + 4, count)) == rows[start : start + 4]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.sets(st.integers(0, 40)),
    st.booleans(),
)  # fmt: skip
def test_cut_accounts_for_every_row(tmp_path_factory, count, size, other_size, done, foreign):
    """Whatever was made, with whatever batch size: chunks tile the plan, and missing is exact."""
    store = ImageStore(Folder(tmp_path_factory.mktemp("store")))
    plan, rows = PlanTable(table(count)), plan_rows(count)
    written: set[str] = set()
    for number in done:
        batch = rows[number * other_size : (number + 1) * other_size]
        if batch:
            store.write(made(batch))
            written |= {row["sample_id"] for row in batch}
    if foreign:
        store.write(made([{**rows[0], "sample_id": "of another plan"}]))
    chunks = cut(plan, store, size)
    assert [chunk.start for chunk in chunks] == list(range(0, count, size))
    assert chunks[-1].stop == count
    assert missing_rows(chunks) == count - len(written)
    for chunk in chunks:
        ids = {row["sample_id"] for row in rows[chunk.start : chunk.stop]}
        assert chunk.missing == len(ids - written)
        found = {i for part in chunk.parts for i in store.read(part)["sample_id"].to_pylist()}
        assert ids & written <= found


def test_finished_chunks_are_known_without_opening_a_file(tmp_path, monkeypatch):
    store, rows = ImageStore(Folder(tmp_path)), plan_rows(12)
    for at in (0, 8):
        store.write(made(rows[at : at + 4]))
    monkeypatch.setattr(ImageStore, "read", None)
    chunks = cut(PlanTable(table(12)), store, 4)
    assert [chunk.missing for chunk in chunks] == [0, 4, 0]


@pytest.mark.parametrize("count", [0, 1, 2000, 2001, 70_000])
def test_blocks_hold_every_chunk_once_and_in_order(count):
    from ray_synth.generation.chunks import Chunk
    from ray_synth.generation.stream import BLOCKS, MOST_CHUNKS_A_BLOCK

    blocks = chunk_blocks([Chunk(i, i + 1, (), 1) for i in range(count)])
    assert [start for block in blocks for start in block["start"].to_pylist()] == list(range(count))
    assert len(blocks) <= max(BLOCKS, count / MOST_CHUNKS_A_BLOCK + 1)
    assert all(block.num_rows <= MOST_CHUNKS_A_BLOCK for block in blocks)
