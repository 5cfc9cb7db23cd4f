"""The arithmetic of estimates: what adds up, what overlaps, and what is left over."""

import pytest
from samples import ROOT

from ray_synth.config import load_config
from ray_synth.pipeline.estimate import Estimate, Measured, compare, estimate
from ray_synth.pipeline.probe import pace
from ray_synth.preflight.demands import Sizes

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
SIZES = Sizes(real=50, classes=10, tests={"in_domain": 2500, "uci": 1797})
MEASURED = Measured(
    service_start=15, meaning=1.5, contexts=1.9, quality=4, make_start=8, make=0.05,
    train_start=15, train_end=2, step_real=0.03, step_mixed=0.08, save=0.5,
    step_beside=0.2, make_beside=0.1,
    test_start=6, test=0.0004, data=0, around=9,
)  # fmt: skip


def seconds(*overrides, shared=True, measured=MEASURED, **more):
    config = load_config(QUICKSTART, list(overrides))
    return estimate(config, SIZES, measured, shared=shared, **more).seconds


def test_a_stage_is_its_start_and_its_work():
    found = seconds("training.feed=stored")
    assert found["meaning"] == 15 + 10 * 1.5
    assert found["plan"] == 10 * 1.9  # the service is up
    assert found["generation"] == 8 + 1200 * 0.05
    once = 15 + 2 + 6 * 0.5
    assert found["training"] == pytest.approx(once + 300 * (0.03 + 0.08))  # one start
    assert found["evaluation"] == pytest.approx(6 + 3 * 4297 * 0.0004)


def test_rounds_start_makers_workers_and_a_scorer_again():
    fixed = seconds("training.feed=stored")
    rounds = seconds("training.feed=stored", "prompting.practice={rounds: 4}")
    more = {stage: rounds[stage] - fixed[stage] for stage in fixed}
    assert more.pop("training") == pytest.approx(3 * (15 + 2 + 0.5 + 8 + 6))
    assert set(more.values()) == {0.0}


def test_on_shared_cores_each_is_slower_until_the_other_is_done():
    found = seconds()
    once = 15 + 2 + 6 * 0.5
    warmup, rest = 640 * 0.05, 560 * 0.1
    steps = 300 - rest / 0.2  # what is left of them when all images are made
    training = once + 300 * 0.03 + 8 + warmup + rest + steps * 0.08
    assert found["training"] == pytest.approx(training)
    assert found["generation"] == 0


def test_on_shared_cores_what_training_did_not_wait_for_is_made_after_it():
    found = seconds("training.steps=100")
    once = 15 + 2 + 2 * 0.5
    left = (560 - 100 * 0.2 / 0.1) * 0.05  # by the generators that are there
    assert found["training"] == pytest.approx(once + 100 * (0.03 + 0.2) + 8 + 640 * 0.05 + left)
    assert found["generation"] == 0
    found = seconds("training.steps=100", "training.num_gpus=1")  # by others: none is held idle
    assert found["generation"] == pytest.approx(8 + left)


def test_apart_generation_and_training_overlap():
    found = seconds("generation.pool={min_size: 1, max_size: 4}", shared=False)
    once = 15 + 2 + 6 * 0.5
    warmup = 640 * 0.05 / 4
    assert found["training"] == pytest.approx(once + 300 * (0.03 + 0.08) + 8 + warmup)
    assert found["generation"] == 0  # 7 s of making, 24 s of training


def test_candidates_that_a_learner_passes_over_are_made_as_well():
    rounds = "prompting.practice={rounds: 4, select: {factor: 3}}"
    found = seconds("training.feed=stored", "data.validation=4", rounds)
    assert found["generation"] == pytest.approx(8 + 1200 * (0.25 + 0.75 * 3) * 0.05)


def test_a_baseline_that_is_not_brief_starts_workers_of_its_own():
    once = 15 + 2 + 6 * 0.5
    long = seconds("training.feed=stored", "training.image_size=224")
    assert long["training"] == pytest.approx(2 * once + 300 * (0.03 + 0.08))


def test_without_training_all_images_are_made_by_the_stage_of_their_own():
    found = seconds(stages=("generation",))
    assert found == {"generation": 8 + 1200 * 0.05, "around": 9}


def test_lockstep_waits_for_every_image():
    apart = seconds("training.feed=lockstep", shared=False)
    once = 15 + 2 + 6 * 0.5
    assert apart["training"] == pytest.approx(once + 300 * 0.03 + 8 + max(1200 * 0.05, 24))
    together = seconds("training.feed=lockstep")
    speed = 0.08 / 0.2 + 0.05 / 0.1  # of both, as a share of what each does alone
    assert together["training"] == pytest.approx(once + 300 * 0.03 + 8 + (60 + 24) / speed)


def test_only_what_is_to_do_counts():
    found = seconds(stages=("plan", "evaluation"))
    assert found["plan"] == 15 + 19  # the service must be started for it alone
    assert set(found) == {"plan", "evaluation", "around"}


def test_hours_are_what_the_units_reserve():
    config = load_config(
        QUICKSTART,
        ["generation.num_gpus=1", "generation.pool={min_size: 1, max_size: 4}", "training.feed=stored",
         "cluster.price_per_gpu_hour=3.6"],
    )  # fmt: skip
    found = estimate(config, SIZES, MEASURED, shared=False, stages=("generation",))
    assert found.seconds["generation"] == 8 + 15
    assert found.hours["gpu_hours"] == pytest.approx(4 * 23 / 3600)
    assert found.cost == pytest.approx(4 * 23 / 1000)


def test_the_comparison_says_how_far_off_it_was():
    expected, taken = {"meaning": 30.0, "around": 10.0}, {"meaning": 25.0, "around": 7.0}
    text = compare(Estimate(expected, {}, 0.0), Estimate(taken, {}, 0.0))
    assert text == (
        "estimate: 40 s expected, 32 s taken (+25%); expected/taken by stage: meaning 30/25, "
        "around 10/7"
    )
    text = compare(Estimate(expected, {}, 0.9), Estimate(taken, {}, 1.2))
    assert text.endswith("; cost 0.90 expected, 1.20 taken (-25%)")


def test_the_pace_leaves_out_the_batches_that_came_together():
    seen = [(10.0, 8), (10.1, 8), (12.1, 8), (12.1, 8), (14.1, 8)]
    assert pace(seen, 2) == pytest.approx(4.0 / 24)
    assert pace(seen, 1) == pytest.approx(4.1 / 32)
    assert pace([(3.0, 8), (4.0, 8)], 2) == pytest.approx(4.0 / 16)  # no more than these
