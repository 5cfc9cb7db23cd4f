"""A user's mistake is one calm line; all else keeps its traceback, and is said to be a bug."""

import errno
import io
import json
import logging
import os
import pickle
import sys
from pathlib import Path

import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from ray_synth.cli import command
from ray_synth.cli.explanation import explain
from ray_synth.errors import UserError
from ray_synth.monitoring import logs
from ray_synth.monitoring.logs import RunLog
from ray_synth.service.client import ServiceError
from ray_synth.service.messages import Problem
from ray_synth.storage.folder import Folder

MESSAGE = "config:\n  training.steps: give 1 or more\n  name: give one"


def caught(work):
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def wrong():
    raise UserError(MESSAGE)


def zip_bug():
    return list(zip([1, 2], [3], strict=True))


def from_users():
    try:
        wrong()
    except UserError as error:
        raise RuntimeError("the stage failed") from error


def while_handling_users():
    try:
        wrong()
    except UserError:
        zip_bug()


def while_handling_a_full_disk():
    try:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")
    except OSError:
        zip_bug()


def in_spite_of_a_full_disk():
    try:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")
    except OSError:
        raise KeyError("mine") from None


def after_a_bug():
    try:
        zip_bug()
    except ValueError:
        raise UserError(MESSAGE) from None


BUGS = [
    zip_bug,
    lambda: [1].index(5),
    lambda: int("x"),
    lambda: {}["x"],
    while_handling_users,
    in_spite_of_a_full_disk,
]


@pytest.mark.parametrize("work", BUGS)
def test_what_is_no_users_mistake_is_not_explained(work):
    assert explain(caught(work)) is None


@pytest.mark.parametrize("work", [wrong, from_users, after_a_bug])
def test_a_users_mistake_is_told_whole(work):
    assert explain(caught(work)) == MESSAGE


def test_a_full_disk_explains_what_fails_after_it():
    assert "no space left on the disk (/data/x)" in explain(caught(while_handling_a_full_disk))


def test_a_problem_of_the_service_is_told_and_keeps_its_facts():
    error = ServiceError(Problem(title="T", status=422, detail="d", request_id="r"))
    assert explain(error) == "T: d (request r)"
    assert pickle.loads(pickle.dumps(error)).problem.status == 422


def test_workers_failures_are_looked_into():
    error = RuntimeError("training failed")
    error.worker_failures = {0: caught(zip_bug)}
    assert explain(error) is None
    error.worker_failures = {0: caught(wrong)}
    assert explain(error) == MESSAGE


HEAD = '\x1b[36mray::Map()\x1b[39m (pid=7, ip=10.0.0.1)\n  File "/a/b.py", line 3, in f\n'
DIRECT = "\n\nThe above exception was the direct cause of the following exception:\n\n"
DURING = "\n\nDuring handling of the above exception, another exception occurred:\n\n"
OURS = f"ray_synth.errors.UserError: {MESSAGE}"
WRAPPED = "ray.exceptions.UserCodeException: UDF failed to process a data block."


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + OURS, MESSAGE),
        (HEAD + OURS + DIRECT + HEAD + WRAPPED, MESSAGE),
        (HEAD + OURS + DURING + HEAD + WRAPPED, MESSAGE),
        (HEAD + OURS + DURING + HEAD + "KeyError: 'x'", None),
        (HEAD + "ValueError: zip() argument 2 is shorter than argument 1", None),
        (HEAD + 'KeyError: "no ray_synth.errors.UserError: here"', None),
    ],
)
def test_a_mistake_that_is_left_as_text_is_found(text, says):
    error = RayTaskError("f", text, RuntimeError("x"), pid=1, ip="10.0.0.1")
    assert explain(error) == says


def test_mistakes_cross_tasks_and_nested_actors(local_ray):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests

    @ray.remote(num_cpus=0)
    def task(work):
        return work()

    @ray.remote(num_cpus=0)
    class Outer:
        def ask(self, work):
            return ray.get(task.remote(work))

    outer = Outer.remote()
    for ask in (task.remote, outer.ask.remote):
        assert explain(caught(lambda: ray.get(ask(wrong)))) == MESSAGE  # noqa: B023
        assert explain(caught(lambda: ray.get(ask(from_users)))) == MESSAGE  # noqa: B023
        assert explain(caught(lambda: ray.get(ask(zip_bug)))) is None  # noqa: B023
        assert explain(caught(lambda: ray.get(ask(while_handling_users)))) is None  # noqa: B023


def run_main(monkeypatch, capsys, work, *options):
    monkeypatch.setattr("ray_synth.report.status_table.show_status", lambda *_, **__: work())
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    with pytest.raises(SystemExit) as ended:
        command.main([*options, "status", "somewhere"])
    return ended.value.code, capsys.readouterr().err


def bug_within_a_run(folder):
    with RunLog(Folder(folder)):
        raise ValueError("hf_secret_value is not in list")


def test_a_bug_keeps_its_traceback_and_is_said_to_be_one(monkeypatch, capsys, tmp_path):
    code, errors = run_main(monkeypatch, capsys, lambda: bug_within_a_run(tmp_path))
    assert code == 1
    assert "Traceback (most recent call last)" in errors
    assert "ValueError: *** is not in list" in errors
    last = errors.strip().splitlines()[-1]
    file = next((tmp_path / "logs").glob("*.jsonl"))
    assert last.startswith("this is a bug in ray-synth")
    assert "report it with the traceback" in last and last.endswith(str(file))
    assert "error: " not in errors
    kept = json.loads(file.read_text().splitlines()[-1])
    assert "bug_within_a_run" in kept["error"]
    assert "hf_secret_value" not in errors + file.read_text()


def test_a_bug_outside_of_a_run_names_no_log(monkeypatch, capsys):
    monkeypatch.setattr(logs, "_last_file", None)
    code, errors = run_main(monkeypatch, capsys, zip_bug)
    assert code == 1 and "Traceback" in errors
    assert errors.strip().endswith("report it with the traceback above")


def test_a_mistake_is_one_line_without_secrets(monkeypatch, capsys):
    def mistake():
        raise UserError("no such place: s3://KEY:hush@bucket/a")

    code, errors = run_main(monkeypatch, capsys, mistake)
    assert code == 2
    assert errors == "error: no such place: s3://***@bucket/a\n"


def test_a_bug_is_a_line_of_json_where_asked(monkeypatch, capsys):
    handler = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    try:
        code, errors = run_main(monkeypatch, capsys, zip_bug, "--log-format", "json")
    finally:
        logs.set_up("text")
    line = json.loads(handler.stream.getvalue())
    assert (code, errors) == (1, "")
    assert line["level"] == "error" and line["message"].startswith("this is a bug in ray-synth")
    assert "in zip_bug" in line["error"]


def denied():
    raise PermissionError(errno.EACCES, "Permission denied", "/data/cats")


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (denied, "/data/cats: permission denied"),
        (lambda: os.mkdir("/tmp/" + "x" * 5000), "too long for the file system"),
        (lambda: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")), "ulimit -n"),
        (lambda: (_ for _ in ()).throw(MemoryError()), "memory ran out"),
        (lambda: (_ for _ in ()).throw(ray.exceptions.OutOfMemoryError("killed")), "of a node"),
        (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")), "of a GPU"),
    ],
)
def test_what_the_machine_lacks_is_said_with_the_files_name(work, says):
    assert says in explain(caught(work))


def test_it_is_said_as_well_where_a_worker_met_it():
    error = caught(denied)
    passed_on = RayTaskError("task", f"PermissionError: {error}", error).as_instanceof_cause()
    assert "/data/cats" in explain(passed_on)
    assert "permission denied" in explain(passed_on)


def test_a_file_that_is_missing_may_be_a_bug():
    assert explain(caught(Path("/nowhere/at/all").read_bytes)) is None
