"""What a run directory remembers, and what it refuses."""

import pytest
from samples import ROOT

from ray_synth.config import load_config
from ray_synth.errors import UserError
from ray_synth.pipeline.records import StageRecords
from ray_synth.stages import STAGES, changed, stage_inputs, up_to
from ray_synth.storage.folder import Folder

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


def log(tmp_path, *overrides) -> StageRecords:
    return StageRecords(
        Folder(tmp_path), stage_inputs(load_config(QUICKSTART, list(overrides)), "g")
    )


def finish_all(stages: StageRecords) -> list[str]:
    done = []
    for stage in STAGES:
        stages.run(stage, lambda s=stage: done.append(s) or {"stage": s})
    return done


def test_a_finished_stage_is_not_done_again(tmp_path):
    assert finish_all(log(tmp_path)) == list(STAGES)
    assert finish_all(log(tmp_path)) == []
    assert set(log(tmp_path).seconds()) == set(STAGES)


@pytest.mark.parametrize(
    ("override", "stage", "key"),
    [
        ("seed=3", "data", "seed"),
        ("meaning.num_images=3", "meaning", "meaning.num_images"),
        ("prompting.multiplier=3", "plan", "prompting.multiplier"),
        ("training.optimizer.lr=3", "training", "training.optimizer.lr"),
        ("training.batch_size=30", "training", "training.batch_size"),
        ("data.ood.uci_digits.images_per_class=3", "evaluation", "data.ood"),
    ],
)
def test_a_changed_setting_names_the_first_stage_it_invalidates(tmp_path, override, stage, key):
    finish_all(log(tmp_path))
    with pytest.raises(ValueError, match="--force-stage") as error:
        log(tmp_path, override).check()
    assert f"finished {stage} stage" in str(error.value)
    assert key in str(error.value)
    changed_log = log(tmp_path, override)
    changed_log.check(force_stage=stage)
    assert finish_all(changed_log) == list(STAGES[STAGES.index(stage) :])


@pytest.mark.parametrize(
    "override",
    [
        "generation.batch_size=3",
        "generation.num_cpus=3",
        "training.memory_mb=1",
        "training.log_every=3",
        "training.checkpoint_every=3",
        "meaning.clip.device=cpu",
        "tracking.enabled=false",
    ],
)
def test_how_a_stage_runs_may_change_at_any_time(tmp_path, override):
    finish_all(log(tmp_path))
    log(tmp_path, override).check()


def test_a_stage_that_failed_is_done_again(tmp_path):
    with pytest.raises(RuntimeError, match="no"):
        log(tmp_path).run("data", lambda: (_ for _ in ()).throw(RuntimeError("no")))
    assert log(tmp_path).run("data", lambda: {"x": 1}) == {"x": 1}


def test_changes_are_told_with_both_values():
    before = {"seed": 1, "training.model": "vit", "generator": "a"}
    now = {"seed": 3, "training.model": "vit", "generator": "b"}
    assert changed(before, now) == ["generator: a -> b", "seed: 1 -> 3"]


def test_settings_of_another_version_do_not_count_at_their_defaults():
    """One that is no more, one of how the work is done, and one that is new."""
    before = {"seed": 1, "training.gone": 7, "training.log_every": 3}
    assert changed(before, {"seed": 1, "training.lambda_synth": 1.0}) == []
    new = {"seed": 1, "training.lambda_synth": 2.0}
    assert changed(before, new) == ["training.lambda_synth: 1.0 -> 2.0"]
    mix = {"seed": 1, "prompting.mix.plain": 1.0}  # the user's own keys have no default
    assert changed(before, mix) == ["prompting.mix.plain: None -> 1.0"]


def test_a_test_set_whose_name_holds_dots_is_an_input_like_any_other(tmp_path):
    def named(path: str) -> StageRecords:
        return log(tmp_path, f"data.ood={{v2.0: {{format: imagefolder, path: {path}}}}}")

    finish_all(named("a"))
    named("a").check()
    with pytest.raises(UserError, match=r"data\.ood\.v2\.0\.path: a -> b"):
        named("b").check()


def test_what_was_begun_keeps_its_name_while_its_inputs_stay(tmp_path):
    token = log(tmp_path).token("training")
    assert log(tmp_path, "training.log_every=7").token("training") == token
    other = log(tmp_path, "training.optimizer.lr=3").token("training")
    assert other != token
    assert log(tmp_path).token("training") == token, "the same inputs, the same name"


@pytest.mark.parametrize("stage", ["trainig", "all", ""])
def test_an_unknown_stage_is_an_error(stage):
    with pytest.raises(UserError, match="unknown stage") as error:
        up_to(stage)
    if stage == "trainig":
        assert "did you mean 'training'?" in str(error.value)
