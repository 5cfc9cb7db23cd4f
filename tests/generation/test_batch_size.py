"""Batch sizes that fit, and what generation costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from language_pipelines import z_image_turbo

from ray_synth.config import GenerationConfig, load_config
from ray_synth.generation.batch_size import (
    LARGEST,
    ONE_BY_ONE,
    batch_of,
    fit_batch,
    measure,
    recorded_batch_size,
)
from ray_synth.generation.cost import cost_note, hours_and_cost
from ray_synth.generation.store import ImageStore
from ray_synth.storage.folder import Folder


@given(st.integers(0, 10**10), st.integers(1, 10**9), st.integers(10**9, 10**11))
def test_the_batch_found_fits_and_twice_as_many_do_not(base, each, available):
    used = {1: base + each, 4: base + 4 * each}
    if base + each > 0.9 * available - 1:
        with pytest.raises(ValueError, match="too much"):
            fit_batch(used, available)
        return
    size = fit_batch(used, available)
    assert size & (size - 1) == 0
    assert base + size * each <= available
    assert size == LARGEST or base + 2 * size * each > 0.9 * available - 1


def test_the_embedded_model_is_measured_for_real():
    config = GenerationConfig(
        model="embedded", width=64, height=64, num_inference_steps=1, batch_size="auto"
    )
    found = measure(config)
    assert 0 < found["one"] <= found["four"] < found["available"] + found["four"]
    assert 1 <= fit_batch({1: found["one"], 4: found["four"] + 1}, found["available"]) <= LARGEST

    assert (found["at_once"], found["alone"]) == (4, False)


def test_a_model_that_makes_one_image_at_a_time_is_no_batch_of_64(tmp_path):
    """Of which a chunk would take longer than what counts as a stall."""
    config = GenerationConfig(
        model=str(z_image_turbo(tmp_path / "model")),
        width=64,
        height=64,
        num_inference_steps=1,
        batch_size="auto",
    )
    found = measure(config)
    assert (found["at_once"], found["alone"]) == (1, True)
    assert batch_of({**found, "available": 10**12}) == ONE_BY_ONE
    with pytest.raises(ValueError, match="too much"):
        batch_of({**found, "available": 10**6})


def test_a_probe_that_ran_out_of_memory_at_four_is_not_taken_for_one_of_four():
    found = {"one": 10**9, "four": 10**9, "available": 10**10, "at_once": 2, "alone": False}
    assert batch_of(found) == 2
    assert batch_of({**found, "four": 2 * 10**9, "at_once": 4}) == 16


def test_a_store_keeps_its_batch_size(tmp_path):
    store = ImageStore(Folder(tmp_path))
    auto = GenerationConfig(batch_size="auto")
    assert recorded_batch_size(auto, store) is None
    store.folder.write_json("batch.json", {"batch_size": 8})
    assert recorded_batch_size(auto, store) == 8
    assert recorded_batch_size(GenerationConfig(batch_size=5), store) == 5


def test_hours_and_cost_follow_what_an_actor_reserves():
    from small_runs import QUICKSTART

    config = load_config(
        QUICKSTART,
        [
            "generation.num_gpus=0.5",
            "generation.num_cpus=2",
            "cluster.price_per_gpu_hour=3",
            "cluster.price_per_cpu_hour=0.1",
        ],
    )
    found = hours_and_cost(config, 7200)
    assert found == {"gpu_hours": 1.0, "cpu_hours": 4.0, "cost": pytest.approx(3.4)}
    note = cost_note({"gpu_seconds": 7200, "rejected": 3, "passed_over": 90}, config)
    assert note == "1.000 GPU-hours, cost 3.40, 3 rejected, 90 passed over"
    assert cost_note({}, load_config(QUICKSTART)) == "0.000 CPU-hours"
