"""`ray-synth submit` against `ray start --head` with token authentication, as on a cluster."""

import os
import signal
import sqlite3
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from forwarder import Forwarder
from head import QUICKSTART, living_actors, ray_synth, start_head, wait_for
from small_runs import NO_LLM, ROOT, SMALL, arguments, line, planned_ids, stored_ids


@pytest.fixture(scope="module")
def head():
    with start_head() as started:
        yield started.env


@pytest.fixture(autouse=True)
def ctrl_c():
    """Processes that are started here react to Ctrl-C, also where a shell's & made pytest ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def small(verb: str, runs: Path, *settings: str) -> list[str]:
    return arguments(verb, runs, *SMALL, *settings)


def started(env: dict[str, str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line(*words), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def tracked(runs: Path) -> list[str]:
    """Status of each MLflow run, where the database is there already."""
    if not (runs / "mlflow.db").exists():
        return []
    with sqlite3.connect(runs / "mlflow.db") as database:
        return [status for (status,) in database.execute("SELECT status FROM runs")]


def parts(runs: Path) -> int:
    return len(list((runs / "quickstart" / "images").glob("part-*.parquet")))


def test_a_submitted_job_ends_with_its_exit_code(head, tmp_path):
    result = ray_synth(head, "submit", *small("plan", tmp_path, *NO_LLM))
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert len(planned_ids(tmp_path / "quickstart")) == 64
    assert "uploads config/quickstart.yaml" in result.stderr
    failed = ray_synth(
        head, "submit",
        *small("run", tmp_path / "other", "data.test={format: imagefolder, path: /nonexistent}"),
    )  # fmt: skip
    assert failed.returncode == 2
    assert "note: data.test.path is a local path: /nonexistent must be there" in failed.stderr
    assert "error: no such folder: /nonexistent" in failed.stdout  # of the job
    assert "job quickstart-2: FAILED, exit code 2" in failed.stderr


@pytest.mark.slow
def test_a_whole_run_is_submitted(head, tmp_path):
    words = small("run", tmp_path, *NO_LLM, "training.baseline=false", "training.steps=10")
    result = ray_synth(head, "submit", *words)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert (tmp_path / "quickstart" / "metrics.json").exists()
    assert "Real + synthetic" in result.stdout


@pytest.mark.slow
def test_a_token_that_is_missing_or_wrong_is_said_and_never_shown(head):
    secret, wrong = head["RAY_AUTH_TOKEN"], "f" * 64
    bare = {key: value for key, value in head.items() if not key.startswith("RAY_AUTH")}
    bare["HOME"] = "/nonexistent"  # no ~/.ray/auth_token either
    for env, message in (
        ({**head, "RAY_AUTH_TOKEN": wrong}, "does not take the token"),
        ({**bare, "RAY_AUTH_MODE": "token"}, "does not take the token"),
        (bare, "asks for a token: set RAY_AUTH_MODE=token"),
    ):
        for words in (["submit", "run"], ["jobs"], ["stop", "quickstart-1"]):
            result = ray_synth(env, *words)
            assert result.returncode == 2
            assert message in result.stderr
            assert secret not in result.stdout + result.stderr
            assert wrong not in result.stdout + result.stderr


@pytest.mark.slow
def test_what_does_not_reach_the_cluster_is_said(head, tmp_path):
    assert "no job nope-1 on this cluster" in ray_synth(head, "follow", "nope-1").stderr
    nowhere = {**head, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    result = ray_synth(nowhere, "submit", "run")
    assert result.returncode == 2
    assert "no Ray dashboard answers at http://127.0.0.1:9" in result.stderr
    result = ray_synth(
        head, "submit", "run", "--set", "training.stpes=1"
    )  # refused before it is sent
    assert result.returncode == 2
    assert "did you mean 'steps'" in result.stderr
    # A variable is passed by its name: its value is in no output of ours.
    env = {**head, "MY_TOKEN": "my-secret"}
    result = ray_synth(env, "submit", "--env", "MY_TOKEN", "doctor", "--config", QUICKSTART)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "SUCCEEDED, exit code 0" in result.stderr
    assert "my-secret" not in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_stopped_at_any_stage_leaves_nothing_and_goes_on(head, tmp_path):
    """Stopped while Serve answers, and while images are made and trained on; then run to its end."""
    words = small(
        "run", tmp_path, "prompting.multiplier=60", "training.steps=200", "training.baseline=false"
    )  # 480 images

    def stop_when(condition):
        job = started(head, "submit", "--id", f"stopped-{len(stops)}", *words)
        wait_for(lambda: condition() or job.poll() is not None, seconds=500)
        assert job.poll() is None, job.communicate()[0]
        stopped = ray_synth(head, "stop", f"stopped-{len(stops)}")
        assert stopped.returncode == 0, stopped.stderr
        assert "stopped; to continue, submit the same again" in stopped.stdout
        output = job.communicate(timeout=180)[0]
        assert job.returncode == 130, output
        assert "what was made is kept" in output  # it ended by itself, and was not killed
        with suppress(AssertionError):
            wait_for(lambda: not living_actors(head), seconds=120)
        assert living_actors(head) == []
        assert tracked(tmp_path) == ["KILLED"]
        stops.append(output)

    stops: list[str] = []
    stop_when(lambda: any("Replica" in name for name in living_actors(head)))
    stop_when(lambda: parts(tmp_path) >= 2)
    before = stored_ids(tmp_path / "quickstart")
    result = ray_synth(head, "submit", *words)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    ids = stored_ids(tmp_path / "quickstart")
    assert sorted(ids) == sorted(planned_ids(tmp_path / "quickstart"))
    assert set(before) < set(ids)
    assert tracked(tmp_path) == ["FINISHED"]
    assert not living_actors(head)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_follower_may_leave_and_come_back(head, tmp_path):
    words = small("generate", tmp_path, *NO_LLM, "prompting.multiplier=60")
    follower = started(head, "submit", "--id", "left", *words)
    assert follower.stdout
    assert any("Running entrypoint" in text for text in follower.stdout)
    follower.send_signal(signal.SIGINT)
    output = follower.communicate(timeout=60)[0]
    assert follower.returncode == 130
    assert "no longer following; job left goes on" in output
    # It goes on: the same run is not begun twice.
    refused = ray_synth(head, "submit", *words)
    assert refused.returncode == 2
    assert "job left is already running" in refused.stderr
    # The connection is cut in the middle: the log goes on, and no line comes twice.
    port = int(head["RAY_API_SERVER_ADDRESS"].rpartition(":")[2])
    forwarder = Forwarder(port)
    there = {**head, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{forwarder.port}"}
    again = started(there, "follow", "left")
    assert again.stdout
    assert any("Running entrypoint" in text for text in again.stdout)
    forwarder.shut()
    assert any("the connection was lost" in text for text in again.stdout)
    forwarder.open()
    rest = again.communicate(timeout=500)[0]
    forwarder.shut()
    assert again.returncode == 0, rest
    assert "Running entrypoint" not in rest
    assert rest.count("wrote ") == 1
    assert sorted(stored_ids(tmp_path / "quickstart")) == sorted(
        planned_ids(tmp_path / "quickstart")
    )
    assert "left" in ray_synth(head, "jobs").stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_local_run_ends_cleanly(tmp_path, number, code):
    """`docker stop`, Kubernetes' end of a pod, or Ctrl-C, in the middle of training."""
    words = small(
        "train", tmp_path, *NO_LLM, "prompting.multiplier=60", "training.steps=300",
        "training.baseline=false",
    )  # fmt: skip
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_A")}
    run = subprocess.Popen(
        line(*words), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    checkpoints = tmp_path / "quickstart" / "checkpoints"
    wait_for(lambda: any(checkpoints.glob("*/checkpoint*")) or run.poll() is not None, seconds=400)
    assert run.poll() is None, run.communicate()[0]
    made = stored_ids(tmp_path / "quickstart")
    run.send_signal(number)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == code, output
    assert "what was made is kept, and the same command continues" in output
    assert tracked(tmp_path) == ["KILLED"]
    again = ray_synth(env, *words)
    assert again.returncode == 0, again.stdout + again.stderr
    ids = stored_ids(tmp_path / "quickstart")
    assert set(made) <= set(ids)
    assert sorted(ids) == sorted(planned_ids(tmp_path / "quickstart"))
