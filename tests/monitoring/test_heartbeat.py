"""The driver's sign of life: what it says, how it ends, and that it ends nothing."""

import json
import os
import time

import pytest

from ray_synth.monitoring import heartbeat, progress
from ray_synth.monitoring.heartbeat import PROGRESS, Heartbeat, process_lives, watched
from ray_synth.monitoring.progress import Bar, under_way
from ray_synth.storage.folder import Folder


def beat(folder) -> dict:
    return json.loads((folder / PROGRESS).read_text())


def test_it_says_what_is_under_way_and_when_something_moved_last(tmp_path):
    folder = Folder(tmp_path)
    bar = Bar("generation", 10, "images", done=2)
    with Heartbeat(folder, "report") as heart, under_way(folder.uri, "generation"), bar:
        heart.beat("running")
        first = beat(tmp_path)
        heart.beat("running")
        assert beat(tmp_path)["moved"] == first["moved"]
        bar.advance()
        heart.beat("running")
    assert first["state"] == "running"
    assert first["stages"][0]["stage"] == "generation"
    assert (first["bars"][0]["done"], first["bars"][0]["total"]) == (2, 10)
    last = beat(tmp_path)
    assert last["state"] == "ended" and last["bars"] == [] == last["stages"]
    assert last["moved"] >= first["moved"]
    assert progress.open_bars() == [] and progress.stages_under_way() == {}


def test_its_thread_writes_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "LOCAL_S", 0.05)
    with Heartbeat(Folder(tmp_path), "report") as heart:
        heart.every_s = 1.0
        first = beat(tmp_path)["time"]
        deadline = time.monotonic() + 20
        while beat(tmp_path)["time"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("error", "state", "told"),
    [
        (ValueError("no GPU\nof 3"), "failed", "ValueError: no GPU"),
        (KeyboardInterrupt(), "stopped", None),
    ],
)
def test_it_says_how_a_run_ended(tmp_path, error, state, told):
    with pytest.raises(type(error)), watched(Folder(tmp_path), "report"):
        raise error
    assert beat(tmp_path)["state"] == state
    assert beat(tmp_path).get("error") == told


def test_a_folder_that_cannot_be_written_ends_nothing_and_is_told_once(tmp_path, caplog):
    (tmp_path / PROGRESS).mkdir()
    (tmp_path / PROGRESS / "x").write_text("")
    with Heartbeat(Folder(tmp_path), "report") as heart:
        heart.beat("running")
    assert [r.getMessage()[:26] for r in caplog.records] == ["cannot write progress.json"]


def test_a_process_is_known_by_its_start_not_by_its_number_alone(tmp_path):
    with Heartbeat(Folder(tmp_path), "report") as heart:
        facts = heart.facts
    assert process_lives(facts) is True
    assert process_lives({**facts, "pid_started": facts["pid_started"] - 100}) is False
    assert process_lives({**facts, "pid": 2**22 + os.getpid()}) is False
    assert process_lives({**facts, "host": "elsewhere"}) is None
