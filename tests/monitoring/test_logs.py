"""Log lines: fields, formats, floods, and never a token."""

import io
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from painting import Painter

from ray_synth.config import GenerationConfig
from ray_synth.generation.maker import GenerationJob
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import make_images
from ray_synth.monitoring import logs
from ray_synth.monitoring.logs import (
    MOST,
    MOST_ALIKE,
    Forwarder,
    Gate,
    JsonFormatter,
    RunLog,
    TextFormatter,
    log,
    where,
)
from ray_synth.monitoring.progress import Board, make_board, watch
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
from ray_synth.storage.folder import Folder
from ray_synth.storage.secrets import redact_value_of


@pytest.fixture
def said():
    """All that is logged, as JSON lines."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    level, before = log.level, list(log.handlers)
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    log.handlers[:] = before
    log.setLevel(level)


def test_a_line_has_its_time_level_run_stage_and_ids(said):
    with where(run="cars", stage="training"):
        log.warning("set aside %s", "a1", extra={"sample_id": "a1", "step": 3})
    log.info("é\nand more")
    first, second = said()
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "warning", "message": "set aside a1", "run": "cars", "stage": "training",
        "sample_id": "a1", "step": 3,
    }  # fmt: skip
    assert second["message"] == "é\nand more"
    assert "run" not in second


def test_fields_are_of_a_thread(said):
    def work(stage: str) -> None:
        with where(stage=stage):
            time.sleep(0.01)
            log.info(stage)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [f"s{i}" for i in range(20)]))
    assert all(line["stage"] == line["message"] for line in said())


def test_an_error_brings_its_traceback(said):
    try:
        raise KeyError("x")
    except KeyError:
        log.exception("it failed")
    assert "KeyError" in said()[0]["error"]


def test_text_is_as_it_always_was():
    record = logging.makeLogRecord({"msg": "plan: %.1f s", "args": (1.25,), "created": 0})
    line = TextFormatter().format(record)
    assert line[8:] == " plan: 1.2 s" and line[2] == line[5] == ":"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAY_AUTH_TOKEN", "ab54a98ceb1f0ad2"),
        ("OPENAI_API_KEY", "sk-abcdef0123456789"),
        ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"),
        ("HF_TOKEN", "hf_abcdefghijkl"),
        ("MLFLOW_TRACKING_PASSWORD", "correct horse"),
        ("MY_LLM", "a-name-that-tells-nothing"),
    ],
)
def test_tokens_of_the_environment_are_never_said(monkeypatch, tmp_path, said, name, value):
    monkeypatch.setenv(name, value)
    if name == "MY_LLM":
        redact_value_of(name)

    def run() -> None:
        log.warning("the server said: no such token %s", value)
        log.info(f"it is {value!r}", extra={"reason": f"bad {value}"})
        try:
            raise RuntimeError(f"401 for {value}")
        except RuntimeError:
            log.exception("asked")
        raise ValueError(f"refused {value}")

    with pytest.raises(ValueError, match="refused"), RunLog(Folder(tmp_path)):
        run()
    text = json.dumps(said()) + "".join(p.read_text() for p in (tmp_path / "logs").iterdir())
    assert text.count("***") >= 8
    assert value not in text
    record = logging.makeLogRecord({"msg": f"x {value} y"})
    assert TextFormatter().format(record).endswith("x *** y")


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 30)), max_size=400))
def test_a_flood_is_held_back_and_counted(steps):
    gate, now = Gate(), 0.0
    let, held, open_since = [], {}, {}
    for wait, kind in steps:
        now += wait
        found = gate.admit(kind, now)
        if found is None:
            held[kind] = held.get(kind, 0) + 1
        else:
            let.append((now, kind))
            assert found == held.pop(kind, 0), "what was held back is told with the next"
        open_since.setdefault(kind, now)
    for kind in open_since:
        mine = [at for at, one in let if one == kind]
        assert all(sum(a <= b < a + 30 for b in mine) <= 2 * MOST_ALIKE for a in mine)
    assert all(sum(a <= b < a + 30 for b, _ in let) <= 2 * MOST for a, _ in let)


def test_kinds_that_are_never_the_same_do_not_fill_the_memory():
    gate = Gate()
    for i in range(10_000):
        gate.admit(i, i * 60.0)
    assert len(gate._seen) <= 1002


def test_what_a_worker_says_is_said_by_the_driver(said):
    board = Board()
    handle = SimpleNamespace(say=SimpleNamespace(remote=board.say))  # without Ray's transport
    worker = logging.getLogger("a worker of the test")
    worker.setLevel(logging.DEBUG)
    worker.addHandler(Forwarder(handle, stage="generation"))
    worker.propagate = False
    for i in range(100):
        worker.warning("set aside %s", i, extra={"sample_id": str(i)})
    counts, lines = board.read()
    assert counts == {} and len(lines) == MOST_ALIKE
    logs.repeat(lines)
    assert board.read() == ({}, [])
    line = said()[0]
    assert line["message"] == "set aside 0"
    assert (line["level"], line["stage"], line["sample_id"]) == ("warning", "generation", "0")
    assert ":" in line["worker"]


def lines_of(folder) -> list[dict]:
    files = sorted((folder / "logs").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_run_keeps_its_lines_and_how_it_ended(tmp_path):

    def run() -> None:
        log.debug("fine")
        assert [line["message"] for line in lines_of(tmp_path)] == ["fine"], "at once"
        raise ValueError("no plan")

    with pytest.raises(ValueError, match="no plan"), RunLog(Folder(tmp_path), run="cars"):
        run()
    assert [(line["run"], line["level"]) for line in lines_of(tmp_path)] == [
        ("cars", "debug"),
        ("cars", "error"),
    ]
    log.warning("after the end")
    assert len(lines_of(tmp_path)) == 2


def test_on_an_object_store_lines_are_written_in_pieces(monkeypatch):
    folder = Folder("memory://test-logs/run")
    monkeypatch.setattr(logs, "PART_BYTES", 1000)
    with RunLog(folder) as run_log:
        for i in range(60):
            log.info("line %d", i)
            if i % 4 == 3:
                run_log.save()
                run_log.save()
    files = [folder.read_bytes(f"logs/{name}") for name in folder.child("logs").names()]
    assert len(files) > 2
    lines = [json.loads(line) for file in files for line in file.splitlines()]
    assert [line["message"] for line in lines] == [f"line {i}" for i in range(60)]


def test_formats_are_named(monkeypatch):
    monkeypatch.setenv(logs.VARIABLE, "jsno")
    with pytest.raises(ValueError, match="RAY_SYNTH_LOG_FORMAT.*text, json"):
        logs.set_up()
    assert not logs.is_json()


def test_the_command_says_its_errors_as_json_where_asked(capsys, tmp_path, monkeypatch):
    from ray_synth.cli.command import main

    root = logging.getLogger()
    handler = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(root, "handlers", [handler])
    try:
        with pytest.raises(SystemExit) as ended:
            main(["--log-format", "json", "status", str(tmp_path / "none")])
        line = json.loads(handler.stream.getvalue())
    finally:
        logs.set_up("text")
    assert ended.value.code == 2
    assert line["level"] == "error" and line["message"].startswith("no run at ")
    assert capsys.readouterr().err == ""


class Talking(Painter):
    """Warns at each batch."""

    def generate(self, rows):
        log.warning("a batch of %d", len(rows), extra={"step": len(rows)})
        return super().generate(rows)


@pytest.mark.slow
def test_what_generators_say_reaches_the_run_and_its_driver(local_ray, tmp_path, said):
    from test_store import plan_rows

    rows = plan_rows(80)
    config = GenerationConfig(
        generator="test_logs:Talking",
        generator_kwargs={"fail": "photo of 77"},
        width=16,
        height=16,
        batch_size=2,
        num_cpus=0.5,
        checks={"policy": "off"},
    )
    board, folder = make_board(), Folder(tmp_path)
    plan = PlanTable(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
    store = ImageStore(folder.child("images"))
    with RunLog(folder, run="cars"), watch(board, {}):
        make_images(GenerationJob(config, plan, store, run=folder, board=board))
    kept = lines_of(tmp_path)
    warned = [line for line in kept if line["level"] == "warning"]
    assert MOST_ALIKE <= len(warned) < 40, "of 40 batches: the rest is held back"
    assert {(line["run"], line["stage"], line["step"]) for line in warned} == {
        ("cars", "generation", 2)
    }
    assert {line["message"] for line in warned} <= {line["message"] for line in said()}
    rejected = [line for line in kept if "rejected" in line["message"]]
    assert sorted(i for line in rejected for i in line["sample_ids"]) == [
        row["sample_id"] for row in rows if "photo of 77" in row["prompt"]
    ]
    assert rejected[0]["reason"] == "ValueError: this prompt cannot be painted"
    assert rejected[0]["chunk"] == "76-78"
