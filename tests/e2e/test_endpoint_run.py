"""A run whose images come from a server: our own, by OpenAI's interface, on a Ray of its own."""

import os
import shlex
import signal
import subprocess
import urllib.request

import pyarrow.parquet as pq
import pytest
import yaml
from head import wait_for
from service import free_port
from small_runs import NO_LLM, QUICKSTART, SMALL, command, line, planned_ids, run, stored_ids


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_takes_its_images_from_our_own_images_server(tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            line("serve", "images", "--port", str(port)),
            stdout=log, stderr=log, start_new_session=True, env={**os.environ, "RAY_ADDRESS": "local"},
        )  # fmt: skip
    try:
        wait_for(lambda: _answers(f"{url}/healthz", server), seconds=300)
        settings = [
            *SMALL, *NO_LLM, "generation.generator=endpoint",
            f"generation.generator_kwargs={{base_url: '{url}/v1', max_images: 64}}",
        ]  # fmt: skip
        found = run(command("run", tmp_path, *settings), timeout=600)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert found.returncode == 0, found.stderr[-4000:]
    folder = tmp_path / "quickstart"
    assert sorted(stored_ids(folder)) == sorted(planned_ids(folder))
    rows = [
        r
        for part in (folder / "images").glob("part-*.parquet")
        for r in pq.read_table(part).to_pylist()
    ]
    assert {(row["width"], row["height"]) for row in rows} == {(64, 64)}
    assert all(f'"server": "127.0.0.1:{port}"' in row["generator"] for row in rows)
    assert "Real + synthetic" in found.stdout


def _answers(url: str, server: subprocess.Popen) -> bool:
    assert server.poll() is None
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_images_made_elsewhere_are_checked_trained_on_and_reported(tmp_path):
    from ray_synth.data.digits import load_digits
    from ray_synth.data.images import encode_array

    pixels, names = load_digits("uci_digits", "test")
    for name in ("six", "seven"):
        (tmp_path / "made" / name).mkdir(parents=True)
        for at in [i for i, found in enumerate(names) if found == name][:20]:
            (tmp_path / "made" / name / f"{at}.png").write_bytes(encode_array(pixels[at]))
    config = tmp_path / "mine.yaml"
    values = yaml.safe_load(QUICKSTART.read_text())
    config.write_text(yaml.safe_dump({**values, "runs_dir": str(tmp_path / "runs")}))
    small = [item for setting in [*SMALL, "meaning.enabled=false"] for item in ("--set", setting)]
    found = run(
        line("import", str(tmp_path / "made"), "--config", str(config), *small), timeout=500
    )
    assert found.returncode == 0, found.stderr[-3000:]
    folder = tmp_path / "runs" / "quickstart"
    assert len(stored_ids(folder)) == 40, "each image once, though 64 were planned"
    again = shlex.split(found.stdout.splitlines()[-1].partition(": ray-synth ")[2])
    found = run(line(*again), timeout=500)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "8 real and 40 synthetic images" in found.stdout
    assert len(stored_ids(folder)) == 40
