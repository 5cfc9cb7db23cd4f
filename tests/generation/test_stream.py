"""Plan to images under Ray Data: every row once, in order, nothing made twice, crashes survived."""

import os
import signal

import pyarrow as pa
import pytest
from test_store import plan_rows
from tiny import embedded

from ray_synth.generation.maker import GenerationJob
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import chunks_from, image_stream, make_images
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
from ray_synth.storage.folder import Folder

CONFIG = embedded()


def table(count):
    return pa.Table.from_pylist(plan_rows(count), schema=PLAN_SCHEMA)


def job(plan, store, config=CONFIG):
    return GenerationJob(config, PlanTable(plan), store)


def test_a_stream_made_again_makes_nothing_twice(local_ray, tmp_path):
    store, plan = ImageStore(Folder(tmp_path)), table(18)
    assert make_images(job(plan.slice(0, 7), store)) == 7
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in store.parts()}
    stream = image_stream(job(plan, store))
    stream.context.execution_options.preserve_order = True
    rows = stream.take_all()
    assert [row["sample_id"] for row in rows] == plan["sample_id"].to_pylist()
    assert all(row["image"] for row in rows)
    assert make_images(job(plan, store)) == 0
    made = [i for name in store.parts() for i in store.read(name)["sample_id"].to_pylist()]
    assert sorted(made) == plan["sample_id"].to_pylist()
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before


def test_a_later_rounds_chunks_come_first_and_those_before_it_after_them(tmp_path):
    given = job(table(18), ImageStore(Folder(tmp_path)))
    size = CONFIG.batch_size
    starts = list(range(0, 18, size))
    late = [start for start in starts if start + size > 7]
    assert [chunk.start for chunk in chunks_from(given, 7, others=False)] == late
    both = [chunk.start for chunk in chunks_from(given, 7, others=True)]
    assert both == late + [start for start in starts if start not in late]
    assert len(both) > len(late) > 1


def test_an_actor_killed_in_mid_run_loses_and_doubles_nothing(local_ray, tmp_path):
    store, plan = ImageStore(Folder(tmp_path)), table(40)
    stream = image_stream(job(plan, store))
    seen, killed = [], False
    for block in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
        seen += block["sample_id"].to_pylist()
        if not killed:
            killed = True
            for pid in actor_pids():
                os.kill(pid, signal.SIGKILL)
    assert sorted(seen) == plan["sample_id"].to_pylist()
    made = [i for name in store.parts() for i in store.read(name)["sample_id"].to_pylist()]
    assert sorted(made) == sorted(seen)


def actor_pids() -> list[int]:
    """Pids of this Ray's generator actors."""
    import psutil

    processes = psutil.process_iter(["cmdline"])
    found = [p.pid for p in processes if "ImageMaker" in " ".join(p.info["cmdline"] or [])]
    assert found, "no generator actor to kill"
    return found


def test_a_model_that_cannot_be_loaded_fails_with_its_name(local_ray, tmp_path):
    from ray_synth.cli.explanation import explain

    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    config = CONFIG.model_copy(update={"model": str(tmp_path / "bad")})
    with pytest.raises(Exception, match="cannot load the generator") as error:
        make_images(job(table(4), ImageStore(Folder(tmp_path / "s")), config))
    assert "bad" in (explain(error.value) or "")
