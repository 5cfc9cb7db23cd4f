"""The whole command: what it leaves, running it again, and killing it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from small_runs import NO_LLM, QUICKSTART, ROOT, SMALL, command, planned_ids, run, stored_ids

from ray_synth.config import load_config

TIMED = ("data", "meaning", "plan", "quality", "generation", "training", "evaluation", "total")

SECRETS = {
    "OPENAI_API_KEY": "sk-planted-hush-1",
    "MLFLOW_TRACKING_PASSWORD": "planted-hush-2",
    "AWS_SECRET_ACCESS_KEY": "planted-hush/3",
    "MY_SERVER": "https://me:planted-hush-4@host/v1?sig=planted-hush-5",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in SECRETS.items():
            environment.setenv(name, value)
        result = run(command("run", runs, *SMALL))
    assert result.returncode == 0, result.stderr[-4000:]
    return runs / "quickstart", result


def test_a_run_prints_its_table_and_where_to_look(finished):
    folder, result = finished
    assert "Real + synthetic" in result.stdout
    assert str(folder / "report" / "index.html") in result.stdout
    assert "mlflow ui --backend-store-uri" in result.stdout
    for ray_s_own in ("retries remaining", "worker processes have been started"):
        assert ray_s_own not in result.stdout + result.stderr
    for stage in TIMED:
        assert stage in result.stdout


def test_no_file_of_a_run_holds_a_secret_of_its_environment(finished):
    """Its config, records, logs and pages, and MLflow's data base and artifacts beside it."""
    folder, result = finished
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.json", "mlflow.db", "index.html"} <= {
        path.name for path in files
    }
    assert any(path.parent.name == "logs" for path in files)
    for path in files:
        assert b"planted-hush" not in path.read_bytes(), path
    assert "planted-hush" not in result.stdout + result.stderr


def test_metrics_hold_what_is_promised(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    for model in (metrics["real_only"], metrics["mixed"]["main"], metrics["mixed"]["aux"]):
        for result in (model["in_domain"], model["ood"]["uci_digits"]):
            assert result["top1_interval"][0] <= result["top1"] <= result["top1_interval"][1]
            assert result["images"] == 40
    assert (metrics["num_real"], metrics["num_synthetic"]) == (8, 64)
    assert metrics["images_per_second"]["generation"] > 0
    assert 0 <= metrics["stall_fraction"] <= 1
    for stage in TIMED:
        assert metrics["seconds"][stage] >= 0


def test_meanings_and_prompts_come_from_the_language_model(finished):
    folder = finished[0]
    meanings = json.loads((folder / "meanings.json").read_text())
    assert [entry["class_name"] for entry in meanings] == ["six", "seven"]
    for entry in meanings:
        assert entry["raw_answers"]
        assert any(candidate["source"] == "llm" for candidate in entry["candidates"])
        assert entry["num_images"] == 4
    import pyarrow.parquet as pq

    plan = pq.read_table(folder / "plan.parquet").to_pylist()
    assert {row["kind"] for row in plan} >= {"contextual", "stylized"}
    assert {row["context_source"] for row in plan} <= {"llm", "pool", "none"}


def test_every_image_is_made_once_and_says_what_made_it(finished):
    folder = finished[0]
    assert sorted(stored_ids(folder)) == sorted(planned_ids(folder))
    import pyarrow.parquet as pq

    row = pq.read_table(next((folder / "images").glob("part-*"))).to_pylist()[0]
    assert row["prompt"]
    assert row["gpu_seconds"] > 0
    assert json.loads(row["generator"])["num_inference_steps"] == 2


def test_an_image_is_made_again_shown_and_exported(finished, tmp_path, capsys, monkeypatch):
    from ray_synth.cli.command import main

    folder = finished[0]
    sample_id = stored_ids(folder)[0]

    def call(*line):
        with pytest.raises(SystemExit) as ended:
            main([*line, "--run", str(folder)])
        return ended.value.code, capsys.readouterr().out

    code, said = call("regenerate", sample_id, "--out", str(tmp_path / "again.png"))
    assert (code, "the same pixels" in said) == (0, True), said
    assert (tmp_path / "again.png").stat().st_size > 100
    assert call("show", "--class", "six", "--out", str(tmp_path / "sheet.png"))[0] == 0
    code, said = call("export", str(tmp_path / "data"), "--layout", "huggingface")
    assert code == 0
    assert f"wrote {len(stored_ids(folder))} images of 2 classes" in said


def test_images_are_judged_against_real_ones(finished):
    import pyarrow.parquet as pq

    rows = [r for part in (finished[0] / "images").glob("part-*") for r in _rows(pq, part)]
    assert all(row["accepted"] for row in rows), "the default policy only flags"
    assert all(-1 <= row["clip_score"] <= 1 and len(row["embedding"]) > 8 for row in rows)
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    flagged = sum(bool(row["reject_reason"]) for row in rows)
    assert metrics["generation"]["flagged"] == flagged
    assert metrics["generation"]["cpu_hours"] > 0


def _rows(pq, part):
    return pq.read_table(
        part, columns=["accepted", "clip_score", "embedding", "reject_reason"]
    ).to_pylist()


def test_both_arms_saw_as_many_real_images(finished):
    cards = [
        json.loads((finished[0] / "models" / f"{arm}.json").read_text())
        for arm in ("real_only", "mixed")
    ]
    assert cards[0]["real_images_seen"] == cards[1]["real_images_seen"] == 30 * 5
    assert cards[0]["steps"] == cards[1]["steps"]


def test_mlflow_holds_parameters_curves_results_and_artifacts(finished):
    from mlflow.tracking import MlflowClient

    folder = finished[0]
    handle = json.loads((folder / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=handle["uri"])
    found = client.get_run(handle["run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["training.steps"] == "30"
    assert "mixed.main.in_domain.top1" in found.data.metrics
    steps = [m.step for m in client.get_metric_history(handle["run_id"], "mixed.loss")]
    assert steps == [10, 20, 30]
    names = {item.path for item in client.list_artifacts(handle["run_id"])}
    assert {"config.yaml", "metrics.json", "index.html"} <= names


def test_the_model_loads_in_plain_timm(finished):
    import timm
    from safetensors.torch import load_file

    card = json.loads((finished[0] / "models" / "mixed.json").read_text())
    model = timm.create_model(card["model"], num_classes=2, **card["model_kwargs"])
    for bn in card["bns"]:
        model.load_state_dict(load_file(finished[0] / "models" / f"mixed.{bn}.safetensors"))


def test_run_again_is_quick_and_makes_nothing(finished):
    folder = finished[0]
    before = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    started = time.monotonic()
    result = run(command("run", folder.parent, *SMALL))
    assert result.returncode == 0, result.stderr[-2000:]
    assert time.monotonic() - started < 30
    assert {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()} == before
    assert "Real + synthetic" in result.stdout


def test_changed_settings_are_refused_with_a_name(finished):
    result = run(command("run", finished[0].parent, *SMALL, "training.steps=40"))
    assert result.returncode == 2
    assert "training.steps: 30 -> 40" in result.stderr
    assert "--force-stage training" in result.stderr


def kill_when(line: list[str], ready) -> None:
    """Start the command, and kill -9 its process when `ready()` holds."""
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not ready():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "it never came to where it should be killed"
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def parts(folder: Path) -> int:
    return len(list((folder / "images").glob("part-*.parquet")))


@pytest.mark.slow  # tests/generation/test_faults.py kills drivers in the default suite
def test_killed_in_generation_it_continues_and_makes_each_row_once(tmp_path):
    folder = tmp_path / "quickstart"
    settings = [*SMALL, *NO_LLM, "generation.num_inference_steps=12"]
    line = command("generate", tmp_path, *settings)
    kill_when(line, lambda: parts(folder) >= 2)
    assert parts(folder) < 8
    result = run(line)
    assert result.returncode == 0, result.stderr[-4000:]
    assert sorted(stored_ids(folder)) == sorted(planned_ids(folder))
    assert len(planned_ids(folder)) == 64


@pytest.mark.slow  # tests/pipeline/test_older_runs.py continues a killed training in the default suite
def test_killed_in_training_it_continues_from_its_checkpoint(tmp_path):
    folder = tmp_path / "quickstart"
    settings = [*SMALL, *NO_LLM, "training.baseline=false", "training.steps=100"]
    line = command("train", tmp_path, *settings, "training.checkpoint_every=10")

    def checkpoints() -> list[Path]:
        """Those that Ray Train has on record: one that was just reported may be lost with it."""
        found = []
        for record in (folder / "checkpoints").glob("mixed-*/checkpoint_manager_snapshot.json"):
            try:
                entries = json.loads(record.read_text())["checkpoint_results"]
            except ValueError:  # being written
                continue
            states = [
                record.parent / entry["checkpoint_dir_name"] / "state.pt" for entry in entries
            ]
            found += [state for state in states if state.exists()]
        return found

    kill_when(line, lambda: bool(checkpoints()))
    assert not (folder / "models" / "mixed.json").exists()
    import torch

    before = torch.load(checkpoints()[0], weights_only=True)["history"]["curve"]
    result = run(line)
    assert result.returncode == 0, result.stderr[-4000:]
    assert sorted(stored_ids(folder)) == sorted(planned_ids(folder))
    curve = json.loads((folder / "models" / "mixed.json").read_text())["curve"]
    assert [point["step"] for point in curve] == list(range(10, 101, 10))
    assert curve[: len(before)] == before, "steps before the checkpoint were not trained again"


@pytest.mark.slow
def test_both_baselines_are_trained_tested_and_named(tmp_path):
    recipe = tmp_path / "mine.yaml"
    settings = load_config(QUICKSTART).training
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": settings.model,
                "model_kwargs": settings.model_kwargs,
                "image_size": 32,
                "augment": "digits",
                "recipe_batch": 8,
                "epochs": 12,
                "optimizer": {"lr": 0.002},
                "loss": "binary_cross_entropy",
            }
        )
    )
    both = [
        f"training.recipe={recipe}",
        "training.baseline=both",
        "training.loss=cross_entropy",
        "training.batch_size=16",
    ]
    found = run(command("run", tmp_path, *SMALL, *NO_LLM, *both, "name=both"))
    assert found.returncode == 0, found.stderr[-4000:]
    assert "gains over real only (matched baseline)" in found.stdout
    assert "over the recipe" in found.stdout
    folder = tmp_path / "both"
    metrics = json.loads((folder / "metrics.json").read_text())
    main = metrics["mixed"]["main"]["in_domain"]
    assert main["gain"]["over"] == "real_only"
    expected = main["top1"] - metrics["recipe"]["in_domain"]["top1"]
    assert main["gain_over_recipe"]["top1"] == pytest.approx(expected)
    card = json.loads((folder / "models" / "recipe.json").read_text())
    assert card["steps"] == 12 * (8 // 8)
    assert card["real_images_seen"] == 12 * 8
    assert "Published recipe" in (folder / "report" / "index.html").read_text()
