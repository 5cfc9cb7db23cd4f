"""docs/cluster.md, followed to the letter in a fresh copy up to where a cloud account is needed."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from documents import Document
from samples import ROOT

MARKER = "<!-- from here on a cloud account is needed -->"


def blocks() -> list[str]:
    """Commands of the steps that any machine can take."""
    local, marker, _ = (ROOT / "docs" / "cluster.md").read_text().partition(MARKER)
    assert marker
    return [block.text for block in Document(local).blocks if block.language == "bash"]


def test_each_of_the_ten_steps_has_one_block_of_commands():
    text = (ROOT / "docs" / "cluster.md").read_text()
    steps = re.split(r"^\*\*\d+\. ", text.partition("\n## ")[0], flags=re.MULTILINE)[1:]
    assert len(steps) == 10
    assert [step.count("```bash\n") for step in steps] == [1] * 10
    assert len(blocks()) == 7


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_local_steps_work_as_they_are_written(tmp_path):
    for port in (8265, 6385):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)), f"port {port} of the doc is in use here"
    copy = tmp_path / "ray-synth"
    subprocess.run(["git", "clone", "--quiet", ROOT, copy], check=True)
    home = Path.home()
    temporary = tempfile.mkdtemp(prefix="d", dir="/tmp")  # short: Ray puts socket paths under it
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("RAY_") and key not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    # A home without a token, and with this one's settings and cache of pip.
    env |= {
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "PYTHON": sys.executable,
        "RAY_TMPDIR": temporary,
        "RAY_USAGE_STATS_ENABLED": "0",
        "COLUMNS": "160",
    }
    steps = [
        f"{block}echo step {number} is done\n" for number, block in enumerate(blocks(), start=1)
    ]
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", "\n".join(steps)],
            cwd=copy, env=env, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = shell.wait(timeout=2900)
        finally:
            ours = [process for process in psutil.process_iter() if _is_of(process, temporary)]
            _, left = psutil.wait_procs(ours, timeout=60)  # they end a moment after the head
            for process in left:
                process.kill()
            shutil.rmtree(temporary, ignore_errors=True)
    said = output.read_text()
    assert code == 0, said[-5000:]
    assert "step 7 is done" in said
    assert not left, f"the head was ended, and these were left: {left}"
    run = copy / "runs" / "first"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["num_synthetic"] == 6 * metrics["num_real"]
    assert (run / "report" / "index.html").exists() and (run / "sheet.png").exists()
    assert "job first-1 stopped" in said and "job first-2: SUCCEEDED, exit code 0" in said
    token = (tmp_path / ".ray" / "auth_token").read_text().strip()
    assert token and token not in said


def _is_of(process: psutil.Process, folder: str) -> bool:
    """Whether it is a Ray process of this session, by its environment."""
    try:
        return process.environ().get("RAY_TMPDIR") == folder
    except psutil.Error:
        return False
