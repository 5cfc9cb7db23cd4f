"""How a run stands, from directories that the real stages, stores and runs left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from small_runs import NO_LLM, ROOT, SMALL, command
from test_store import made, plan_rows

from ray_synth.cli.command import main
from ray_synth.config import parse_config
from ray_synth.generation.store import ImageStore
from ray_synth.monitoring.heartbeat import PROGRESS, Heartbeat, watched
from ray_synth.monitoring.logs import log
from ray_synth.monitoring.progress import Bar, under_way
from ray_synth.pipeline.records import StageRecords
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
from ray_synth.report.status import DONE, RUNNING, SILENT, read_status
from ray_synth.report.status_table import show_status
from ray_synth.stages import STAGES, stage_inputs
from ray_synth.storage.folder import Folder


class RealRun:
    """A run directory, written by what writes it in a run."""

    def __init__(self, uri, **settings) -> None:
        values = yaml.safe_load((ROOT / "jobs/configs/quickstart.yaml").read_text())
        config = parse_config({**values, **settings})
        self.folder = Folder(uri)
        self.stages = StageRecords(self.folder, stage_inputs(config, "a generator"))
        self.store = ImageStore(self.folder.child("images"))
        self.folder.write_yaml("config.yaml", {**config.model_dump(mode="json"), "versions": {}})

    def finish(self, *stages: str) -> None:
        for stage in stages:
            self.stages.run(stage, dict)

    def plan(self, count: int) -> list[dict]:
        rows = plan_rows(count)
        self.folder.write_table("plan.parquet", pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
        self.finish("data", "meaning", "plan", "quality")
        return rows

    def make(self, rows: list[dict], *, at: float | None = None, **facts) -> None:
        name = self.store.write([{**row, **facts} for row in made(rows)])
        if at is not None:
            os.utime(self.store.folder.path(name), (at, at))

    def stage(self, name: str, **options):
        return next(s for s in read_status(self.folder, **options).stages if s.name == name)


@pytest.fixture
def run(tmp_path):
    return RealRun(tmp_path / "run")


def test_a_run_that_is_generating_tells_counts_rate_and_time_left(run):
    rows = run.plan(80)
    with Heartbeat(run.folder, "report") as heart, under_way(run.folder.uri, "generation"):
        now = time.time()
        for part in range(4):  # one per minute
            run.make(rows[8 * part : 8 * part + 8], at=now - 60 * (3 - part))
        with Bar("generation", 80, "images"):
            heart.beat("running")
            status = read_status(run.folder, now=now)
    found = {stage.name: stage for stage in status.stages}
    assert [found[name].state for name in STAGES[:4]] == ["done"] * 4
    generation = found["generation"]
    assert (generation.state, generation.done, generation.total) == ("under way", 32, 80)
    assert generation.left_s == pytest.approx((80 - 32) / (8 / 60))
    assert found["training"].state == found["evaluation"].state == "waiting"
    assert (status.verdict, status.exit_code) == ("running", RUNNING)
    assert status.silent_s < 5


def test_packed_images_are_counted_by_the_names_of_their_files(run):
    from test_packs import pack

    rows = run.plan(40)
    for at in range(0, 24, 2):
        run.make(rows[at : at + 2], at=1_000.0 + at)
    pack(PlanTable(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)), run.store, 2, rows=16)
    assert len(run.store.parts()) == 1 + 4
    stage = run.stage("generation")
    assert (stage.done, stage.total) == (24, 40)
    for at in range(24, 32, 2):
        run.make(rows[at : at + 2], at=1_000.0 + at)
    pack(PlanTable(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)), run.store, 2, rows=16)
    assert len(run.store.parts()) == 2
    assert run.stage("generation").done == 32


def test_rejected_and_flagged_images_are_told_by_reason(run):
    rows = run.plan(12)
    run.make(rows[:4], accepted=False, reject_reason="clip score 0.1 below 0.2")
    run.make(rows[4:8], reject_reason="blank: no pixels")
    run.make(rows[8:])
    status = read_status(run.folder)
    assert status.judged == 12
    assert status.rejected == {"rejected: clip score": 4, "flagged: blank": 4}


def test_a_large_store_is_counted_by_its_listing(run):
    rows = run.plan(400)
    now = time.time()
    for part in range(80):
        run.make(rows[4 * part : 4 * part + 4], at=now - 80 + part)
    Path(run.store.folder.path(".part-x.parquet.tmp")).touch()
    generation = run.stage("generation")
    assert (generation.done, generation.total, generation.note) == (320, 400, "about")
    assert read_status(run.folder).judged == 64 * 4, "the newest alone are read"


def test_training_is_told_by_the_newest_record_of_ray_train(run):
    run.plan(8)
    for number, (name, step) in enumerate([("mixed-old", 30), ("mixed-new", 20)]):
        folder = run.folder.child("checkpoints").child(name)
        record = {
            "latest_checkpoint_result": {"checkpoint_dir_name": "c", "metrics": {"step": step}}
        }
        folder.write_json("checkpoint_manager_snapshot.json", record)
        os.utime(folder.path("checkpoint_manager_snapshot.json"), (1000 + number,) * 2)
    run.folder.write_json("models/real_only.json", {})
    training = run.stage("training")
    assert (training.note, training.done, training.total) == ("mixed", 20, 300)
    run.folder.child("checkpoints/mixed-new").write_bytes(
        "checkpoint_manager_snapshot.json", b'{"latest_ch'
    )
    assert run.stage("training").done == 30, "a record that is being written is passed over"


def test_without_a_heartbeat_silence_is_judged_by_the_files(run):
    run.plan(8)
    now = time.time()
    assert read_status(run.folder, now=now + 60).verdict == "running"
    status = read_status(run.folder, now=now + 20 * 60)
    assert (status.verdict, status.exit_code) == ("silent", SILENT)
    assert status.message.startswith("for 20 min: likely dead or stalled; the same command")


def test_a_driver_elsewhere_is_silent_after_a_while_and_one_that_moves_nothing_stalls(run):
    run.plan(8)
    with Heartbeat(run.folder, "report") as heart, under_way(run.folder.uri, "generation"):
        heart.facts["host"] = "elsewhere"
        with Bar("generation", 8, "images"):
            heart.beat("running")
        now = time.time()
        beat = run.folder.read_json(PROGRESS)
    run.folder.write_json(PROGRESS, beat)  # as it was left by one that was killed
    assert read_status(run.folder, now=now + 60).verdict == "running"
    assert read_status(run.folder, now=now + 200).verdict == "silent"
    run.folder.write_json(PROGRESS, {**beat, "time": now + 1000})
    status = read_status(run.folder, now=now + 1001)
    assert (status.verdict, status.exit_code) == ("stalled", SILENT)
    assert "nothing has moved for 17 min" in status.message


@pytest.mark.parametrize(
    ("error", "verdict", "says"),
    [
        (ValueError("no GPU"), "failed", "ValueError: no GPU; fix that, and the same command"),
        (KeyboardInterrupt(), "stopped", "the same command continues"),
    ],
)
def test_how_it_ended_is_told(run, error, verdict, says):
    run.plan(8)
    with pytest.raises(type(error)), Heartbeat(run.folder, "report"):
        raise error
    status = read_status(run.folder)
    assert (status.verdict, status.exit_code) == (verdict, SILENT)
    assert says in status.message


def test_a_killed_driver_is_known_at_once_on_its_own_machine(run):
    run.plan(8)
    code = (
        "import sys, time; from ray_synth.monitoring.heartbeat import watched; "
        "from ray_synth.storage.folder import Folder\n"
        "with watched(Folder(sys.argv[1]), 'report'): print('up', flush=True); time.sleep(300)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, run.folder.uri], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout and process.stdout.readline() == b"up\n"
    assert read_status(run.folder).verdict == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    status = read_status(run.folder)
    assert (status.verdict, status.exit_code) == ("killed", SILENT)


def test_done_is_done_and_so_is_a_part_that_was_asked_for(run):
    run.plan(8)
    with Heartbeat(run.folder, "plan"):
        pass
    status = read_status(run.folder)
    assert (status.exit_code, status.message) == (DONE, "up to plan, as requested")
    run.finish(*STAGES)
    run.folder.write_json("metrics.json", {})
    status = read_status(run.folder)
    assert (status.verdict, status.exit_code) == ("done", DONE)
    assert all(stage.state == "done" for stage in status.stages)


def test_it_reads_a_run_by_its_uri_and_prints_a_table_or_json(tmp_path, capsys):
    run = RealRun((tmp_path / "run").as_uri())
    run.make(run.plan(12)[:8])
    codes = []
    for options in ([], ["--json"], ["--watch", "1"]):
        with pytest.raises(SystemExit) as ended:
            main(["status", run.folder.uri, *options])
        codes.append(ended.value.code)
        if not options:
            table = capsys.readouterr().out
        elif options == ["--json"]:
            whole = json.loads(capsys.readouterr().out)
            run.finish(*STAGES)
            run.folder.write_json("metrics.json", {})
    assert codes == [RUNNING, RUNNING, DONE]
    assert "8 of 12 images" in table and "running: last sign of life" in table
    assert whole["exit_code"] == RUNNING
    assert [stage["name"] for stage in whole["stages"]] == list(STAGES)


def test_no_run_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"no run at .* no config\.yaml; give a run's directory"):
        read_status(Folder(tmp_path))
    with pytest.raises(ValueError, match="--watch 0: give a number of seconds"):
        show_status(Folder(tmp_path), watch=0)


def test_studies_are_told_by_what_is_trained_and_reported(tmp_path):
    studies = Folder(tmp_path / "run" / "studies")
    for digest in ("a", "b", "c"):
        studies.write_json(f"arms/models/{digest}.json", {})
    studies.write_json("sources/s1/config.yaml", {})
    studies.write_json("ablation/study.json", {})
    with Heartbeat(studies, "all") as heart, Bar("trainings", 12, "trials", done=3):
        heart.beat("running")
        status = read_status(Folder(tmp_path / "run"))
    assert [(s.name, s.done, s.total) for s in status.stages] == [
        ("sources", 1, None),
        ("trials", 3, 12),
        ("studies", 1, None),
    ]
    assert status.verdict == "running"
    assert read_status(studies).verdict == "done"


@pytest.fixture
def bucket(monkeypatch):
    """The URI of a run on a real S3 server."""
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testtest")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    _, port = server.get_host_and_port()
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    uri = f"s3://bucket/runs/cars?{options}&allow_bucket_creation=true"
    Folder(uri).filesystem.create_dir("bucket")
    yield uri
    server.stop()


@pytest.mark.slow
def test_on_an_object_store_all_of_it_is_kept_and_read(bucket):
    run = RealRun(bucket)
    rows = run.plan(24)
    with watched(run.folder, "report"), under_way(run.folder.uri, "generation"):
        log.warning("the first line")
        run.make(rows[:8])
        run.make(rows[8:16], accepted=False, reject_reason="blank: no pixels")
        status = read_status(run.folder)
        assert (status.verdict, status.judged) == ("running", 16)
        assert status.rejected == {"rejected: blank": 8}
    status = read_status(run.folder)
    assert (status.verdict, status.message) == ("done", "up to report, as requested")
    logs = run.folder.child("logs")
    (name,) = logs.names(".jsonl")
    line = json.loads(logs.read_bytes(name))
    assert (line["run"], line["message"]) == ("cars", "the first line")


@pytest.mark.slow
def test_a_real_run_watched_killed_and_finished(tmp_path):
    folder = Folder(tmp_path / "quickstart")
    line = command(
        "run", tmp_path, *SMALL, *NO_LLM, "training.baseline=false", "training.steps=150"
    )
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = set()
    try:
        deadline = time.monotonic() + 300
        while ("training", "under way", True) not in seen:
            assert process.poll() is None and time.monotonic() < deadline, seen
            time.sleep(0.5)
            if not folder.exists(PROGRESS):
                continue
            status = read_status(folder)
            assert status.exit_code == RUNNING
            seen |= {(s.name, s.state, bool(s.done)) for s in status.stages}
    finally:
        process.kill()
        process.wait()
    assert ("plan", "done", False) in seen
    assert read_status(folder).verdict == "killed"
    done = subprocess.run(line, cwd=ROOT, capture_output=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    status = read_status(folder)
    assert (status.verdict, status.exit_code) == ("done", DONE)
    assert status.judged == 64
    lines = [
        json.loads(text)
        for path in (tmp_path / "quickstart" / "logs").iterdir()
        for text in path.read_text().splitlines()
    ]
    assert {line["run"] for line in lines} == {"quickstart"}
    assert {"training", "evaluation"} <= {line.get("stage") for line in lines}
