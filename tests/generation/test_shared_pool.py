"""Several jobs through one pool: each store gets its own images, and the models are loaded once."""

import pyarrow as pa
from test_store import plan_rows
from tiny import embedded

from ray_synth.config import QualityConfig
from ray_synth.generation.maker import GenerationJob, ImageMaker
from ray_synth.generation.shared_pool import (
    MAKERS,
    SharedMaker,
    make_together,
    pool_key,
    share_batch_sizes,
)
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import missing_chunks
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
from ray_synth.storage.folder import Folder

CONFIG = embedded()


def jobs(folder, sizes, config=CONFIG):
    return [
        GenerationJob(
            config,
            PlanTable(pa.Table.from_pylist(plan_rows(size), schema=PLAN_SCHEMA)),
            ImageStore(Folder(folder / str(number))),
        )
        for number, size in enumerate(sizes)
    ]


def held(job):
    rows = [row for name in job.store.parts() for row in job.store.read(name).to_pylist()]
    return {row["sample_id"]: row["image"] for row in rows}


def test_each_store_gets_the_images_that_its_own_maker_would_make(local_ray, tmp_path):
    together, alone = jobs(tmp_path / "a", [10, 6]), jobs(tmp_path / "b", [10, 6])
    ImageMaker(together[0]).chunk(0, 4, [])  # what is there is not made again
    before = together[0].store.parts()
    work = [(job, missing_chunks(job)) for job in together]
    assert [sum(chunk.missing for chunk in chunks) for _, chunks in work] == [6, 6]
    make_together(work, at_a_time=2)
    assert set(before) <= set(together[0].store.parts())
    maker = SharedMaker(alone)
    for number, (job, other) in enumerate(zip(together, alone, strict=True)):
        assert missing_chunks(job) == []
        for chunk in missing_chunks(other):
            maker._maker(number).chunk(chunk.start, chunk.stop, [])
        assert held(job) == held(other)


def test_the_makers_of_a_process_share_one_generator(tmp_path):
    maker = SharedMaker(jobs(tmp_path, [4, 4]))
    chunks = {"job": [0, 1, 0], "start": [0, 0, 0], "stop": [4, 4, 4], "parts": [[], [], []]}
    assert maker(pa.table(chunks))["rows"].to_pylist() == [4, 4, 4]
    first, second = maker._maker(0), maker._maker(1)
    assert first is not second
    assert first._models is second._models
    assert ImageMaker(first.job)._models is not first._models


def test_a_process_keeps_few_makers(tmp_path):
    maker = SharedMaker(jobs(tmp_path, [4] * (MAKERS + 2)))
    made = [maker._maker(number) for number in range(MAKERS + 2)]
    assert maker._maker(MAKERS + 1) is made[-1]
    assert len(maker._makers) == MAKERS


def test_jobs_whose_checks_differ_share_a_pool_and_those_of_other_models_do_not(tmp_path):
    def key(**changes):
        return pool_key(jobs(tmp_path, [4], CONFIG.model_copy(update=changes))[0])

    assert key(checks=QualityConfig(policy="flag")) == key()
    assert key(num_inference_steps=2) != key()
    assert key(model="other") != key()


def test_stores_of_one_configuration_share_a_probe_of_the_batch_size(tmp_path):
    open_size = CONFIG.model_copy(update={"batch_size": "auto"})
    first, second, third = jobs(tmp_path, [4, 4, 4], open_size)
    second.store.folder.write_json("batch.json", {"batch_size": 16, "device": "gpu"})
    share_batch_sizes([first, second, third, *jobs(tmp_path / "given", [4])])
    for job in (first, third):
        found = job.store.folder.read_json("batch.json")
        assert found == {"batch_size": 16, "device": "gpu"}
    assert not (tmp_path / "given/0/batch.json").exists()
