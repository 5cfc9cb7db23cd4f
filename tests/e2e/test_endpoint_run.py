"""A run whose images come from a server: our own, by OpenAI's interface, on a Ray of its own."""

import os
import signal
import socket
import subprocess
import time
import urllib.request

import pyarrow.parquet as pq
import pytest
from small_runs import NO_LLM, SMALL, command, line, planned_ids, run, stored_ids


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
        _wait(f"{url}/healthz", server)
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
        r for part in (folder / "images").glob("*.parquet") for r in pq.read_table(part).to_pylist()
    ]
    assert {(row["width"], row["height"]) for row in rows} == {(64, 64)}
    assert all(f'"server": "127.0.0.1:{port}"' in row["generator"] for row in rows)
    assert "Real + synthetic" in found.stdout


def _wait(url: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} does not answer")
