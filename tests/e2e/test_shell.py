"""What a newcomer types around a run: licences, dry runs, JSON, quiet, colours, completion."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import NO_LLM, ROOT, SMALL, command, line, run

from ray_synth.cli.exit_codes import EXIT_CODES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CARD = """---
license: other
license_name: flux-1-dev-non-commercial-license
---
# A generator
"""
RESTRICTED = "FLUX non-commercial (by its card)"


def test_a_model_whose_licence_restricts_outputs_is_named_wherever_its_images_are(tmp_path):
    from ray_synth.embedded import sd_folder

    model = tmp_path / "generator"
    shutil.copytree(sd_folder(), model)
    (model / "README.md").write_text(CARD)
    settings = [*SMALL, *NO_LLM, f"generation.model={model}", "tracking.enabled=false"]
    looked = run(command("doctor", tmp_path, *settings))
    assert f"licence of generator generator: {RESTRICTED}" in " ".join(looked.stdout.split())
    assert "no legal advice" in looked.stdout
    done = run(command("run", tmp_path, *settings), timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert RESTRICTED in " ".join(done.stderr.split())
    folder = tmp_path / "quickstart"
    assert RESTRICTED in (folder / "report" / "index.html").read_text()
    data = tmp_path / "data"
    out = run(line("export", str(data), "--run", str(folder), "--layout", "huggingface"))
    assert out.returncode == 0, out.stderr[-3000:]
    assert "FLUX non-commercial" in (data / "README.md").read_text()


def test_the_habits_of_a_shell(tmp_path):
    """A dry run before, figures as JSON after, and what a script can rely on."""
    settings = [*SMALL, *NO_LLM, "tracking.enabled=false"]
    tried = run([*command("run", tmp_path, *settings), "--dry-run", "--json"])
    assert tried.returncode == 0, tried.stderr[-3000:]
    assert not any(step["done"] for step in json.loads(tried.stdout)["steps"])
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"

    done = run([*command("run", tmp_path, *settings), "--quiet"], timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert " INFO " not in done.stderr
    folder = str(tmp_path / "quickstart")
    status = json.loads(run(line("status", folder, "--json")).stdout)
    assert status["verdict"] == "done"
    figures = json.loads(run([*command("report", tmp_path, *settings), "--json"]).stdout)
    assert 0 <= figures["mixed"]["main"]["in_domain"]["top1"] <= 100

    wrong = subprocess.run(
        command("run", tmp_path, *settings, "training.setps=40"),
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "80"},
    )  # fmt: skip
    assert wrong.returncode == 2 and wrong.returncode in EXIT_CODES
    assert "steps" in wrong.stderr and "Traceback" not in wrong.stderr
    assert not re.search(r"\x1b\[[39]", wrong.stderr + wrong.stdout)
    assert max(map(len, wrong.stderr.splitlines())) <= 80

    typed = {
        "_RAY_SYNTH_COMPLETE": "complete_bash",
        "COMP_WORDS": "ray-synth stat",
        "COMP_CWORD": "1",
    }
    asked = subprocess.run(
        [Path(sys.executable).with_name("ray-synth")],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **typed},
    )  # fmt: skip
    assert asked.stdout.split() == ["status"]
