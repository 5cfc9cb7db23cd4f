"""Every script of jobs/ starts from any folder, by its own copy of the package."""

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
