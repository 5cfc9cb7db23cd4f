"""Rounds of practice as a user runs them: killed at random moments, and with test images out of reach."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from small_runs import ROOT, SMALL, command, planned_ids, run, stored_ids

KILLS = int(os.environ.get("RAY_SYNTH_PRACTICE_KILLS", "4"))
# The driver plans; brief trainings are tasks (`_train`), others have a controller and workers.
WORKERS = ["ray::_train", "RayTrainWorker", "TrainController", "MapWorker"]
SETTINGS = [
    *SMALL, "meaning.enabled=false", "prompting.contexts_per_class=0",
    "prompting.mix={plain: 1, stylized: 1}", "generation.generator=glyphs",
    "generation.checks.policy=off", "data.validation=4", "data.train.images_per_class=8",
    "prompting.multiplier=6", "prompting.practice={rounds: 3}", "training.feed=stored",
    "training.baseline=none", "tracking.enabled=false", "cluster.num_cpus=6",
]  # fmt: skip
STEERED = [
    "data.validation=20", "data.train.images_per_class=8", "prompting.multiplier=12",
    "prompting.mix={plain: 1, contextual: 1}", "generation.checks.policy=retry",
    "generation.num_inference_steps=4", "training.feed=stored", "training.baseline=none",
    "tracking.enabled=false",
    "prompting.practice={rounds: 6, contexts: true, apart: words, stop: 100, select: {factor: 2}, "
    "guidance: {scale: 0.1, steps: 0.5}}",
]  # fmt: skip
LOCKSTEP = [*SETTINGS, "training.feed=lockstep"]


def kept(folder: Path) -> dict[str, str]:
    """Digests of what rounds decide: plans and cards, scores, learners and the model. Seconds that were
    spent are no part of it, nor is what a part of a training leaves to the next, which tells them."""
    found = {}
    for path in sorted(
        p for part in ("plan", "practice", "models") for p in (folder / part).rglob("*.*")
    ):
        if path.name == "state.pt":
            continue
        data = path.read_bytes()
        if path.name == "mixed.json":
            card = json.loads(data)
            for name in ("seconds", "stall_fraction"):
                card.pop(name)
            data = json.dumps(card).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return {**found, "plan": hashlib.sha256((folder / "plan.parquet").read_bytes()).hexdigest()}


def processes(driver: int, name: str) -> list[psutil.Process]:
    """Those of a driver's own Ray whose command line has a name."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def disturbed(line: list[str], rng: random.Random, kills: int, log: Path) -> int:
    """Run the command to its end, its driver or one of its workers killed now and then.

    Args:
        kills: at most so many; of them those of the driver end the command, which is then given again.
        log: keeps what it says.

    Returns:
        How many there were.
    """
    done, driver = 0, None
    try:
        while True:
            if driver is None or driver.poll() is not None:
                with log.open("a") as said:
                    driver = subprocess.Popen(line, cwd=ROOT, stdout=said, stderr=said)
            if _ends(driver, rng.uniform(5, 60) if done < kills else 600):
                assert driver.returncode == 0, log.read_text()[-4000:]
                return done
            assert done < kills, "it hangs"
            there = {name: processes(driver.pid, name) for name in WORKERS}
            victim = rng.choice(["driver", *(name for name, found in there.items() if found)])
            if victim == "driver":
                driver.kill()
                driver.wait()
            else:
                rng.choice(there[victim]).kill()
            done += 1
            with log.open("a") as said:
                said.write(f"killed: {victim}\n")
    finally:
        if driver is not None and driver.poll() is None:
            driver.kill()
            driver.wait()


def _ends(driver: subprocess.Popen, seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    try:
        driver.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return whole_run(tmp_path_factory.mktemp("runs"), *SETTINGS)


@pytest.fixture(scope="module")
def undisturbed_lockstep(tmp_path_factory) -> Path:
    return whole_run(tmp_path_factory.mktemp("lockstep"), *LOCKSTEP)


def whole_run(runs: Path, *settings: str) -> Path:
    """The folder of a run that nobody disturbs."""
    result = run(command("run", runs, *settings))
    assert result.returncode == 0, result.stderr[-4000:]
    return runs / "quickstart"


@pytest.mark.slow
def test_a_run_in_rounds_makes_every_image_once_and_shows_its_rounds(undisturbed):
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    assert metrics["practice"]["rounds"] == 3
    planned = planned_ids(undisturbed)
    assert len(planned) == len(set(planned)) == 96
    assert sorted(stored_ids(undisturbed)) == sorted(planned)
    card = json.loads((undisturbed / "models" / "mixed.json").read_text())
    assert [point["step"] for point in card["curve"]] == [10, 20, 30]
    learner = json.loads((undisturbed / "practice/learner-000/models/mixed.json").read_text())
    assert (learner["steps"], learner["num_synthetic"]) == (10, 32)
    page = (undisturbed / "report" / "index.html").read_text()
    assert "Round 2" in page
    assert "Weakest before" in page
    scores = json.loads((undisturbed / "practice/scores-002.json").read_text())
    assert scores["real"]["set"] == "validation"


@pytest.mark.slow
@pytest.mark.timeout(300 + 180 * KILLS)
@pytest.mark.parametrize("feed", ["stored", "lockstep"])
def test_killed_at_random_the_same_command_goes_on_to_the_same_rounds(feed, request, tmp_path):
    """RAY_SYNTH_PRACTICE_KILLS times, half of them with each feed. In lockstep images are made while they
    are trained on."""
    settings = LOCKSTEP if feed == "lockstep" else SETTINGS
    whole = request.getfixturevalue("undisturbed_lockstep" if feed == "lockstep" else "undisturbed")
    rng, done, number, kills = random.Random(0), 0, 0, max(1, KILLS // 2)
    while done < kills:
        runs = tmp_path / f"runs-{number}"
        done += disturbed(
            command("run", runs, *settings), rng, kills - done, tmp_path / f"log-{number}"
        )
        folder, number = runs / "quickstart", number + 1
        assert kept(folder) == kept(whole)
        assert sorted(stored_ids(folder)) == sorted(planned_ids(folder))
        assert len(planned_ids(folder)) == 96


@pytest.mark.slow
def test_rounds_of_a_live_feed_are_made_whole_and_trained_on(tmp_path):
    result = run(command("run", tmp_path, *SETTINGS, "training.feed=live"))
    assert result.returncode == 0, result.stderr[-4000:]
    folder = tmp_path / "quickstart"
    planned = planned_ids(folder)
    assert len(planned) == len(set(planned)) == 96
    assert sorted(stored_ids(folder)) == sorted(planned)
    card = json.loads((folder / "models" / "mixed.json").read_text())
    assert card["curve"][-1]["step"] == 30
    scores = json.loads((folder / "practice/scores-002.json").read_text())
    assert scores["synthetic"]["images"] == 32, "all of the round were there to be scored"


@pytest.mark.slow
def test_all_that_practice_can_do_in_one_run_and_an_early_end(tmp_path):
    """The language model writes anew, the learner guides the embedded sampler and chooses among
    candidates, and rounds end where none can gain what `stop` asks for."""
    result = run(command("run", tmp_path, *SMALL, *STEERED))
    assert result.returncode == 0, result.stderr[-4000:]
    folder = tmp_path / "quickstart"
    metrics = json.loads((folder / "metrics.json").read_text())
    practice = metrics["practice"]
    assert (practice["rounds"], practice["of"], practice["ended"]) == (3, 6, True)
    assert (practice["images"], practice["images_saved"]) == (96, 96)
    written = json.loads((folder / "plan/contexts-001.json").read_text())["classes"]
    assert all(scene["source"] for found in written.values() for scene in found["contexts"])
    assert len(written) == 1, "of the weakest tenth"
    rows = [
        row
        for part in sorted((folder / "images").glob("part-*.parquet"))
        for row in pq.read_table(part, columns=["sample_id", "generator"]).to_pylist()
    ]
    made_by = {row["sample_id"]: json.loads(row["generator"]) for row in rows}
    planned = planned_ids(folder)
    assert sorted(made_by) == sorted(planned)
    assert not any("steering" in made_by[name] for name in planned[:32])
    for at, name in enumerate(planned[32:], 32):
        steering = made_by[name]["steering"]
        assert steering["learner"] == f"practice/learner-{at // 32 - 1:03d}"
        assert (steering["factor"], steering["guidance"]["scale"]) == (2, 0.1)
    curve = json.loads((folder / "models/mixed.json").read_text())["curve"]
    assert curve[-1]["step"] == 30, "training goes on to its end on the images that are there"
    page = (folder / "report/index.html").read_text()
    assert "after 3 of 6: 96 images were not made" in page


@pytest.mark.slow
def test_no_test_image_is_opened_before_the_evaluation(tmp_path):
    """They are taken away when they were looked at, before round 0; training ends all the same, and the
    evaluation cannot begin."""
    from samples import encoded

    for part, count in (("train", 9), ("test", 2)):
        for at, name in enumerate(("six", "seven")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                picture = encoded(100 * at + number + (50 if part == "test" else 0))
                (tmp_path / part / name / f"{number}.png").write_bytes(picture)
    data = [
        f"data.{part}={{format: imagefolder, path: {tmp_path / part}}}"
        for part in ("train", "test")
    ]
    settings = [
        s for s in SETTINGS if not s.startswith(("data.train", "data.test", "data.ood"))
    ] + [*data, "data.ood={}"]
    folder = tmp_path / "quickstart"
    result = run(command("plan", tmp_path, *settings))
    assert result.returncode == 0, result.stderr[-4000:]
    for path in (tmp_path / "test").rglob("*.png"):  # listed as before, and nothing to be opened
        found = path.stat()
        path.write_bytes(b"x" * found.st_size)
        os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns))
    result = run(command("train", tmp_path, *settings))
    assert result.returncode == 0, result.stderr[-4000:]
    assert (folder / "practice" / "scores-002.json").exists()
    result = run(command("run", tmp_path, *settings))
    assert result.returncode != 0, "the evaluation opens them, and they are no images"
