"""Every script of jobs/ starts from any folder, by its own copy of the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from samples import ROOT

SCRIPTS = [path for path in sorted((ROOT / "jobs").glob("*.py")) if "__main__" in path.read_text()]
MODULES = ("jobs.embedded_models", "jobs.embedded_models.measure", "jobs.embedded_models.samples")


def helped(*words: str, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    line = [sys.executable, *words, "--help"]
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_what_it_takes_and_does_nothing(path: Path, tmp_path: Path) -> None:
    assert "usage" in helped(str(path), cwd=tmp_path).lower()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MODULES)
def test_the_recipes_modules_run_from_the_checkout(name: str) -> None:
    assert "usage" in helped("-m", name, cwd=ROOT).lower()


def test_a_job_runs_the_code_beside_it(tmp_path: Path) -> None:
    """`ray job submit --working-dir .` uploads a copy of the checkout; nodes may have another."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/run.py").write_bytes((ROOT / "jobs/run.py").read_bytes())
    (tmp_path / "ray_synth/cli").mkdir(parents=True)
    (tmp_path / "ray_synth/cli/command.py").write_text("def main(words): print('usage:', words)\n")
    assert helped("jobs/run.py", cwd=tmp_path) == "usage: ['run', '--help']\n"


@pytest.mark.slow
def test_the_feeds_bench_measures_all_contenders_and_ends_with_its_figures(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "jobs" / "bench.py"), "feed", "--images=96", "--batches=2"]
    line += ["--batch-size=16", "--rounds=1", "--workers=1,2", "--policy=imagenet_rand"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    rates = figures["images_per_second"]
    assert set(rates) == {"ours", "ours_tar", "dataloader", "webdataset"}
    assert all(rate > 0 for each in rates.values() for rate in each.values())
    assert figures["feed_over_dataloader"] > 0
    assert 0 < figures["parent_ms_per_image"] < 1
    assert set(figures["linear_share"]) == {"1", "2"}
