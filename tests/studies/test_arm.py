"""Which trials and sources are the same, and which are not."""

from dataclasses import replace

import pytest
from samples import ROOT

from ray_synth.config import PracticeConfig, load_config
from ray_synth.errors import UserError
from ray_synth.studies.amounts import long_tail
from ray_synth.studies.arm import PRACTICE, REAL_ONLY, VALIDATION_PER_CLASS, Arm, trials_of
from ray_synth.studies.catalog import WRITERS, known_name, seeds_of, studies
from ray_synth.studies.grid import held_together

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COUNTS = dict.fromkeys(NAMES, 230)
REAL = Arm(REAL_ONLY, "real only")
WHOLE = Arm("whole", "whole", 6.0)


@pytest.fixture(scope="module")
def config():
    return load_config(QUICKSTART)


@pytest.fixture(scope="module")
def catalogue(config):
    return studies(config, COUNTS)


def one(config, arm, seed=0, **options):
    return trials_of(config, [arm], [seed], **options)[0]


def test_real_only_is_the_same_trial_whatever_is_set_for_synthetic_images(config):
    plain = one(config, REAL)
    for key, value in {
        "prompting.mix": {"plain": 1.0},
        "generation.num_inference_steps": 8,
        "training.lambda_synth": 3.0,
        "training.dual_bn": False,
        "meaning.enabled": False,
    }.items():
        other = one(config, Arm("real", "real", 0, {key: value}))
        assert (other.digest, other.source) == (plain.digest, plain.source), key


def test_the_baseline_keeps_the_number_of_real_images_of_a_step(config):
    changed = Arm("real", "real", 0, {"training.batch_size": 128, "training.real_fraction": 0.25})
    assert one(config, changed).digest == one(config, REAL).digest
    assert one(config, changed).config.training.num_real == 32


def test_the_baseline_of_a_study_is_the_configs(config, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"model: {config.training.model}\nimage_size: 32\nrecipe_batch: 64\nepochs: 3\n"
        "optimizer: {name: lamb, lr: 0.02}\n"
    )
    overrides = [f"training.recipe={mine}", "training.baseline=recipe"]
    alone = load_config(QUICKSTART, overrides)
    training = one(alone, REAL).config.training
    assert (training.num_real * training.accumulate_steps, training.epochs) == (64, 3)
    assert training.optimizer.lr == 0.02
    assert one(alone, WHOLE).config.training.optimizer.lr == config.training.optimizer.lr
    catalogue = studies(alone, COUNTS)
    assert {study.baseline for study in catalogue.values()} == {"recipe"}
    same = load_config(QUICKSTART, ["training.baseline=none"])
    assert one(same, REAL).digest == one(config, REAL).digest


@pytest.mark.parametrize(
    "settings",
    [
        {"training.dual_bn": False},
        {"training.lambda_synth": 0.7},
        {"training.optimizer": {"lr": 0.01}},
        {"prompting.mix": {"plain": 1.0}},
        {"data.train.images_per_class": 4} | {},
    ],
)
def test_what_changes_the_result_changes_the_trial(config, settings):
    settings = {
        k: {**config.training.optimizer.model_dump(), **v}
        if isinstance(v, dict) and "lr" in v
        else v
        for k, v in settings.items()
    }
    assert one(config, Arm("a", "a", 6.0, settings)).digest != one(config, WHOLE).digest


def test_seeds_differ_and_pools_do_not(config):
    assert one(config, WHOLE, 1).digest != one(config, WHOLE, 0).digest
    faster = Arm("a", "a", 6.0, {"generation.num_cpus": 2.0, "training.memory_mb": 1})
    assert one(config, faster).digest == one(config, WHOLE).digest


def test_scales_are_prefixes_of_one_plan_as_long_as_any_study_needs(config):
    arms = [Arm(f"x{scale}", "", scale) for scale in (1.0, 6.0, 24.0)]
    trials = trials_of(config, arms, [0])
    assert len({trial.source for trial in trials}) == 1
    assert len({trial.digest for trial in trials}) == 3
    assert {trial.config.prompting.multiplier for trial in trials} == {24.0}
    alone = one(config, arms[1], everything=arms)
    assert alone.digest == trials[1].digest  # whether or not the others are asked for
    assert one(config, arms[1]).config.prompting.multiplier == 6.0


def test_a_source_is_known_by_what_makes_its_images(config):
    shared = one(config, Arm("a", "a", 6.0, {"training.dual_bn": False}))
    assert shared.source == one(config, WHOLE).source
    steps = one(config, Arm("a", "a", 6.0, {"generation.num_inference_steps": 2}))
    assert steps.source != one(config, WHOLE).source


def test_every_trial_holds_validation_images_out_and_draws_from_a_finished_store(config, catalogue):
    arms = [arm for study in catalogue.values() for arm in study.arms]
    for trial in trials_of(config, arms, [0]):
        assert trial.config.data.validation == VALIDATION_PER_CLASS
        assert trial.config.training.feed == "stored"
        assert not trial.config.tracking.enabled


def test_only_the_study_of_practice_trains_in_rounds_each_number_of_images_a_plan_of_its_own(
    config,
):
    practising = config.model_copy(
        update={
            "prompting": config.prompting.model_copy(
                update={"practice": PracticeConfig(rounds=3, stop=None, floor=0.5)}
            )
        }
    )
    catalogue = studies(practising, COUNTS)
    for study in catalogue.values():
        for trial in trials_of(practising, study.arms, [0]):
            practice = trial.config.prompting.practice
            assert (practice is not None) == (PRACTICE in trial.arm.settings)
            if practice is not None:
                assert study.name == "practice"
                assert (practice.rounds, practice.floor) == (3, 0.5)
                assert trial.config.prompting.multiplier == trial.arm.scale
    third, whole = (
        one(practising, arm, everything=catalogue["practice"].arms)
        for arm in catalogue["practice"].arms
        if arm.name in ("rounds_third", "rounds")
    )
    assert third.source != whole.source
    # What the model is decides the later rounds.
    rounds = next(arm for arm in catalogue["practice"].arms if arm.name == "rounds")
    other = replace(rounds, settings={**rounds.settings, "training.lambda_synth": 0.1})
    assert one(practising, other).source != one(practising, rounds).source


def test_rounds_of_fewer_images_than_classes_are_no_arms(config):
    few = config.model_copy(update={"studies": config.studies.model_copy(update={"scale": 0.5})})
    names = [arm.name for arm in studies(few, COUNTS)["practice"].arms]
    assert "rounds" not in names, "5 images of each of 10 classes, half as many made"
    assert "fixed" in names
    every = [arm.name for arm in studies(config, COUNTS)["practice"].arms]
    assert {"rounds", "rounds_third", "by_class", "tail_rounds"} <= set(every)


def test_a_wrong_setting_of_an_arm_is_named(config):
    with pytest.raises(ValueError, match=r"arm odd.*\n.*lambda_synth"):
        one(config, Arm("odd", "odd", 6.0, {"training.lambda_synth": -1}))


def test_all_studies_see_the_same_number_of_real_images_in_every_arm(config, catalogue):
    assert list(catalogue) == list(WRITERS) and len(catalogue) == 12
    for study in catalogue.values():
        names = [arm.name for arm in study.arms]
        assert len(set(names)) == len(names)
        assert {arm.against for arm in study.arms} <= {*names, REAL_ONLY}
        seen = {
            t.config.training.num_real * t.config.training.steps
            for t in trials_of(config, study.arms, [0])
        }
        assert len(seen) == 1, study.name


def test_studies_share_trials(config, catalogue):
    every = [arm for study in catalogue.values() for arm in study.arms]
    digests = [
        {t.digest for t in trials_of(config, study.arms, [0], everything=every)}
        for study in catalogue.values()
    ]
    assert len(set.union(*digests)) <= sum(map(len, digests)) - 12


def test_a_long_tail_falls_from_the_most_to_a_twentieth(config):
    tail = list(long_tail(COUNTS, config).values())
    assert tail[0] == 20 and tail[-1] == 1
    assert tail == sorted(tail, reverse=True)


def test_levels_that_the_data_cannot_give_are_left_out(config):
    few = studies(config, dict.fromkeys(COUNTS, 6))["low_data"]
    assert {arm.x for arm in few.arms if arm.x} == {2, 5}


def test_an_unknown_study_is_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'ablation'"):
        known_name("ablations")
    assert known_name("domain-shift") == "domain_shift"


def test_rivals_are_told_apart_by_what_is_made_for_each_seed(config):
    pool = config.model_copy(update={"studies": config.studies.model_copy(update={"pool": "p"})})
    assert [arm.rival for arm in studies(config, COUNTS)["rivals"].arms] == ["", "", "tuned"]
    assert [arm.rival for arm in studies(pool, COUNTS)["rivals"].arms][3:] == ["retrieved"]
    by_seed = {seed: {"prompting.negative_prompt": f"blur {seed}"} for seed in (0, 1)}
    arm = Arm("tuned", "tuned", 6.0, rival="tuned", by_seed=by_seed)
    found = trials_of(config, [arm, WHOLE], [0, 1], everything=[Arm("x24", "", 24.0)])
    assert [t.config.prompting.negative_prompt for t in found] == ["blur 0", "blur 1", "", ""]
    assert [t.config.prompting.multiplier for t in found] == [6.0, 6.0, 24.0, 24.0]
    assert len({t.source for t in found}) == 4


def test_a_study_can_take_more_seeds_than_others(config):
    given = config.studies.model_copy(update={"seeds": [3], "more_seeds": {"low-data": 2}})
    config = config.model_copy(update={"studies": given})
    assert seeds_of(config, "low_data") == [0, 1]
    assert seeds_of(config, "mix") == [3]
    for wrong, said in ({"low_dat": 2}, "low_data"), ({"all": 2}, "studies.seeds"):
        given = config.studies.model_copy(update={"more_seeds": wrong})
        with pytest.raises(UserError, match=said):
            seeds_of(config.model_copy(update={"studies": given}), "mix")


def test_models_are_tested_as_many_at_a_time_as_memory_holds(config):
    trials = [one(config, Arm("whole", "the whole", 6), seed) for seed in range(5)]
    sizes = {
        f"{trial.digest}.{bn}.safetensors": (10, 0) for trial in trials for bn in ("main", "aux")
    }
    few = [[t.seed for t in some] for some in held_together(trials, sizes, most=45)]
    assert few == [[0, 1], [2, 3], [4]]
    assert [len(some) for some in held_together(trials, sizes, most=5)] == [1] * 5
    assert list(held_together([], sizes)) == []


def test_the_same_training_in_two_studies_is_done_once(config, catalogue):
    """The whole of the ablation is dual BN at the scale that all studies have."""
    whole = next(arm for arm in catalogue["ablation"].arms if arm.name == "whole")
    scaled = next(arm for arm in catalogue["scaling"].arms if arm.name == f"dual_{whole.scale:g}x")
    assert one(config, whole).digest == one(config, scaled).digest
