"""Run directories that version 0.1 left: continued, shown, exported, reported and made again.

`runs_0_1.tar.xz` has three small runs of commit 538c024: one finished, one killed in mixed training
(its newest checkpoint is of step 25) and one killed when its contexts were written.
"""

import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_runs import SMALL, command, planned_ids, run, stored_ids

from ray_synth.cli.command import main
from ray_synth.config import load_run_config
from ray_synth.generators.registry import fingerprint
from ray_synth.pipeline.records import StageRecords, adopt_older
from ray_synth.stages import TABLE, stage_inputs
from ray_synth.storage.folder import Folder

SETTINGS = [
    *SMALL,
    "prompting.multiplier=4",
    "tracking.enabled=false",
    "training.checkpoint_every=5",
    "training.model_kwargs={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1], stem_chs: 8, "
    "stem_type: deep, output_stride: 8}",
]
KILLED_IN_TRAINING = [
    "generation.num_inference_steps=8",
    "training.steps=100",
    "training.log_every=5",
]


@pytest.fixture
def runs(tmp_path) -> Path:
    with tarfile.open(Path(__file__).with_name("runs_0_1.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def call(capsys, *line: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*line])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    return said.out


def test_a_finished_run_is_shown_exported_and_reported(runs, tmp_path, capsys):
    folder = runs / "finished"
    status = json.loads(call(capsys, "status", str(folder), "--json"))
    assert status["verdict"] == "done"
    assert [stage["state"] for stage in status["stages"]] == ["done"] * 7
    left = {name for stage in TABLE for name in stage.leaves} - {"checkpoints"}  # too large to keep
    assert [name for name in sorted(left) if not (folder / name).exists()] == []
    call(capsys, "show", "--run", str(folder), "--out", str(tmp_path / "sheet.png"))
    said = call(capsys, "export", str(tmp_path / "data"), "--run", str(folder))
    assert "wrote 32 images of 2 classes" in said
    sample_id = stored_ids(folder)[0]
    again = str(tmp_path / "again.png")
    with pytest.raises(SystemExit):  # the exit code says whether all pixels are the same
        main(["regenerate", sample_id, "--run", str(folder), "--out", again, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["sample_id"] == sample_id
    # Another kind of processor adds up differently, also of two with AVX-512; on one machine the image
    # is the same to the bit (tests/generation/test_regenerate.py).
    assert found["largest_difference"] <= 8


def test_a_finished_run_is_finished_for_the_same_command(runs):
    folder = runs / "finished"
    before = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    # Settings of how the work is done may differ from those of then.
    others = ["training.log_every=3", "training.checkpoint_every=7", "meaning.clip.device=cpu"]
    found = run(command("run", runs, *SETTINGS, "name=finished", *others))
    assert found.returncode == 0, found.stderr[-2000:]
    assert "Real + synthetic" in found.stdout
    assert (folder / "report" / "index.html").exists()
    assert {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()} == before
    refused = run(command("run", runs, *SETTINGS, "name=finished", "training.optimizer.lr=1"))
    assert refused.returncode == 2
    assert "training.optimizer.lr: 0.003 -> 1" in refused.stderr


def test_what_an_older_version_had_begun_keeps_its_name(runs):
    """The folder of its checkpoints, and its scenes, are those that the new code looks for."""
    for name, stage, token in (
        ("killed-in-training", "training", "f8ec2559b36e"),
        ("killed-in-plan", "plan", "09dba0e017ef"),
    ):
        folder = Folder(runs / name)
        config = load_run_config(folder)
        generator = fingerprint(config.generation)
        adopt_older(folder, generator)
        changed = config.model_copy(
            update={"training": config.training.model_copy(update={"log_every": 1})}
        )
        assert StageRecords(folder, stage_inputs(changed, generator)).token(stage) == token
        other = config.model_copy(update={"seed": 7})
        assert StageRecords(folder, stage_inputs(other, generator)).token(stage) != token
    assert (runs / "killed-in-training" / "checkpoints" / "mixed-f8ec2559b36e").is_dir()
    assert Folder(runs / "killed-in-plan").read_json("contexts.json")["digest"] == "09dba0e017ef"


@pytest.mark.slow
def test_a_run_that_was_killed_in_training_goes_on_from_its_checkpoint(runs):
    import torch

    folder = runs / "killed-in-training"
    made = stored_ids(folder)
    states = sorted((folder / "checkpoints").glob("mixed-f8ec2559b36e/*/state.pt"))
    before = torch.load(states[-1], weights_only=True)["history"]["curve"]
    assert [point["step"] for point in before] == [5, 10, 15, 20, 25]
    settings = [*SETTINGS, *KILLED_IN_TRAINING, "name=killed-in-training"]
    found = run(command("train", runs, *settings, "training.checkpoint_every=50"))
    assert found.returncode == 0, found.stderr[-4000:]
    curve = json.loads((folder / "models" / "mixed.json").read_text())["curve"]
    assert [point["step"] for point in curve] == list(range(5, 101, 5))
    assert curve[: len(before)] == before, "steps before the checkpoint were not trained again"
    assert sorted(stored_ids(folder)) == sorted(planned_ids(folder)) == sorted(made)


def test_contexts_that_were_written_are_not_written_again(runs):
    folder = runs / "killed-in-plan"
    written = json.loads((folder / "contexts.json").read_text())["classes"]
    assert set(written) == {"six", "seven"}
    found = run(command("plan", runs, *SETTINGS, "name=killed-in-plan"))
    assert found.returncode == 0, found.stderr[-4000:]
    assert json.loads((folder / "contexts.json").read_text())["classes"] == written
    plan = pq.read_table(folder / "plan.parquet")
    assert (
        plan["sample_id"].to_pylist()
        == pq.read_table(runs / "finished" / "plan.parquet")["sample_id"].to_pylist()
    ), "the same prompts, seeds and generator as then"
    assert Folder(str(folder)).read_json("stages/plan.json")["result"]["num_synthetic"] == 32
