"""What each arm of a run is told: the mixed one and its baselines."""

import json

import pytest
from samples import ROOT

from ray_synth.config import load_config
from ray_synth.pipeline.run import check_run
from ray_synth.report.status import read_status

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


@pytest.fixture
def recipe(tmp_path):
    """A recipe of the quickstart's model, for 64 images per step, with rates and a length of its own."""
    training = load_config(QUICKSTART).training
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"model: {training.model}\nmodel_kwargs: {training.model_kwargs}\nimage_size: 32\n"
        "augment: digits\nrecipe_batch: 64\nepochs: 10\nloss: binary_cross_entropy\n"
        "optimizer: {name: lamb, lr: 0.02}\n"
    )
    return path


def run_of(tmp_path, recipe, *settings):
    return check_run(
        load_config(
            QUICKSTART, [f"runs_dir={tmp_path / 'runs'}", f"training.recipe={recipe}", *settings]
        )
    )


def test_each_baseline_has_its_batch_steps_and_rates(tmp_path, recipe):
    own = ["training.optimizer.lr=0.003", "training.loss=cross_entropy"]
    run = run_of(tmp_path, recipe, "training.baseline=both", *own)
    assert run.arms == ["real_only", "recipe", "mixed"]
    jobs = {arm: run.train_job(arm, num_synthetic=9 if arm == "mixed" else 0) for arm in run.arms}
    mixed, matched, alone = jobs["mixed"], jobs["real_only"], jobs["recipe"]
    assert matched.config == mixed.config
    assert (matched.steps, matched.config.num_real) == (mixed.steps, 32)
    assert (mixed.num_synth, matched.num_synth, alone.num_synth) == (64, 0, 0)
    assert alone.config.num_real * alone.config.accumulate_steps == 64
    assert alone.steps == 10  # epochs of 50 images, less than a batch
    assert (alone.config.optimizer.lr, mixed.config.optimizer.lr) == (0.02, 0.003)
    assert (alone.config.loss, mixed.config.loss) == ("binary_cross_entropy", "cross_entropy")
    assert alone.config.checkpoint_every == mixed.config.checkpoint_every


@pytest.mark.parametrize(
    ("baseline", "arms"),
    [("matched", ["real_only"]), ("recipe", ["recipe"]), ("none", []), ("true", ["real_only"]),
     ("false", [])],
)  # fmt: skip
def test_a_baseline_says_which_arms_there_are(tmp_path, recipe, baseline, arms):
    assert run_of(tmp_path, recipe, f"training.baseline={baseline}").arms == [*arms, "mixed"]


def test_status_knows_the_arms_of_every_version(tmp_path, recipe):
    run = run_of(tmp_path, recipe)
    for baseline, trained in ((True, "real_only"), ("matched", "real_only"), ("recipe", "recipe")):
        folder = run.runs.child(f"run-{baseline}")
        training = {"baseline": baseline, "steps": 5}
        folder.write_yaml("config.yaml", {"name": "x", "training": training})
        for arm in ("real_only", "recipe"):
            folder.write_json(f"models/{arm}.json", {})
        said = json.dumps(read_status(folder).as_dict())
        assert f"{trained} is trained" in said
