"""The rehearsal of the ImageNet run, with few classes: every stage, killed twice, each row made once."""

import json
import subprocess
import sys

import pytest
from small_runs import ROOT, planned_ids, stored_ids


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_small_rehearsal_is_killed_twice_and_makes_each_row_once(tmp_path):
    settings = {"classes": 20, "per-class": 60, "generators": 8, "trainers": 2, "steps": 60,
                "contexts": 4, "minutes": 10,
                "planned": 7200}  # fmt: skip
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    found = subprocess.run(
        [sys.executable, "-m", "rehearsal", str(tmp_path), *options],
        cwd=ROOT / "jobs", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    figures = json.loads(found.stdout.splitlines()[-1])
    assert figures["killed_in"] == ["meaning", "training"]
    assert figures["planned"] == figures["made"] == 6 * 20 * 60
    run = tmp_path / "runs" / "rehearsal"
    assert sorted(stored_ids(run)) == sorted(planned_ids(run))
    assert figures["bucket_requests"]["get"] >= 20 * 60  # each real image was looked at
    assert (run / "models" / "mixed.json").exists()
