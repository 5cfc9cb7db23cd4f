"""What a run directory remembers, and what it refuses."""

import pytest
from samples import ROOT

from ray_synth.config import load_config
from ray_synth.stages import STAGES, StageLog, changed, stage_inputs
from ray_synth.storage.folder import Folder

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


def log(tmp_path, *overrides) -> StageLog:
    return StageLog(Folder(tmp_path), stage_inputs(load_config(QUICKSTART, list(overrides)), "g"))


def finish_all(stages: StageLog) -> list[str]:
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
        "training.num_threads=1",
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
    assert changed({"a": 1, "b": 2}, {"a": 3, "b": 2, "c": 4}) == ["a: 1 -> 3", "c: None -> 4"]
