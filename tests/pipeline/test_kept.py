"""What finished stages left: cut off, edited or lost, it is named; a store is filled again."""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import ROOT
from test_store import made

from ray_synth.config import load_config
from ray_synth.errors import UserError
from ray_synth.generation.store import ImageStore
from ray_synth.pipeline.kept import check_kept, choices_digest
from ray_synth.pipeline.run import begin, check_run
from ray_synth.prompting.plan import ClassPrompts, make_plan
from ray_synth.prompting.plan_file import PLAN_FILE, PLAN_SCHEMA
from ray_synth.prompting.plan_settings import plan_settings

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's config whose meanings, plan and images are done, and its folder as it was left."""
    config = load_config(
        QUICKSTART,
        [f"runs_dir={tmp_path_factory.mktemp('runs')}", "data.train.images_per_class=1",
         "prompting.multiplier=1", "generation.batch_size=4"],
    )  # fmt: skip
    run = check_run(config)
    begin(run)
    names = run.train.class_names
    choices = {name: f"the number {name}" for name in names}
    run.folder.write_json("meanings.json", [{"class_name": n, "choice": choices[n]} for n in names])
    run.records.run("meaning", lambda: choices)
    classes = [ClassPrompts(at, name, choices[name], []) for at, name in enumerate(names)]
    plan = make_plan(classes, num_images=len(names), **plan_settings(run.config))
    run.folder.write_tables(PLAN_FILE, PLAN_SCHEMA, [plan])
    result = {"num_synthetic": len(names), "digest": run.folder.digest(PLAN_FILE)}
    run.records.run("plan", lambda: {**result, "meanings": choices_digest(choices)})
    rows = made(plan.to_pylist())
    for at in range(0, len(rows), 4):
        run.store.write(rows[at : at + 4])
    run.records.run("generation", lambda: {})
    kept = {
        path: path.read_bytes() for path in Path(run.folder.path()).rglob("*") if path.is_file()
    }
    return config, run.folder, kept


@pytest.fixture
def opened(finished):
    """The same, put back."""
    config, folder, kept = finished
    for path, data in kept.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return config, folder


def edit_plan(folder, change):
    rows = folder.read_table(PLAN_FILE).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows)), folder.path(PLAN_FILE))


def edit_meanings(folder, change):
    folder.write_json("meanings.json", change(folder.read_json("meanings.json")))


def test_a_run_as_it_was_left_is_as_it_was_left(opened):
    run = check_run(opened[0])
    check_kept(run)
    assert run.todo("generation") == ["data", "quality"]


PLANS = {
    "empty": lambda folder: folder.write_bytes(PLAN_FILE, b""),
    "truncated": lambda folder: folder.write_bytes(PLAN_FILE, folder.read_bytes(PLAN_FILE)[:-9]),
    "gone": lambda folder: folder.delete(PLAN_FILE),
    "prompt": lambda folder: edit_plan(folder, lambda r: [{**r[0], "prompt": "mine"}, *r[1:]]),
    "a row less": lambda folder: edit_plan(folder, lambda rows: rows[1:]),
    "a row twice": lambda folder: edit_plan(folder, lambda rows: [rows[0], *rows[:-1]]),
    "seed": lambda folder: edit_plan(folder, lambda r: [{**r[0], "seed": -1}, *r[1:]]),
    "column": lambda f: edit_plan(f, lambda rows: [{"prompt": r["prompt"]} for r in rows]),
}


@pytest.mark.parametrize("how", PLANS)
def test_a_plan_that_is_not_the_one_that_was_written(opened, how):
    config, folder = opened
    PLANS[how](folder)
    with pytest.raises(UserError, match=r"plan\.parquet is damaged .*--force-stage plan"):
        check_kept(check_run(config))
    check_kept(check_run(config, "plan"))  # the fix goes on


MEANINGS = {
    "empty": lambda folder: folder.write_bytes("meanings.json", b""),
    "truncated": lambda f: f.write_bytes("meanings.json", f.read_bytes("meanings.json")[:-9]),
    "gone": lambda folder: folder.delete("meanings.json"),
    "a mapping": lambda folder: folder.write_json("meanings.json", {"six": "6"}),
    "no choice": lambda f: edit_meanings(f, lambda e: [{"class_name": i["class_name"]} for i in e]),
    "a class less": lambda folder: edit_meanings(folder, lambda entries: entries[1:]),
    "null": lambda folder: edit_meanings(folder, lambda entries: [None, *entries[1:]]),
}


@pytest.mark.parametrize("how", MEANINGS)
def test_meanings_that_cannot_be_read(opened, how):
    config, folder = opened
    MEANINGS[how](folder)
    with pytest.raises(UserError, match=r"meanings\.json is damaged .*--force-stage meaning"):
        check_kept(check_run(config))
    check_kept(check_run(config, "meaning"))


def test_meanings_that_were_edited_go_into_a_plan_to_come_and_not_behind_a_finished_one(
    opened, caplog
):
    config, folder = opened
    edit_meanings(folder, lambda entries: [{**entries[0], "choice": "a crane"}, *entries[1:]])
    with pytest.raises(UserError, match=r"meanings\.json .*'a crane'.*--force-stage plan"):
        check_kept(check_run(config))
    with caplog.at_level(logging.WARNING, "ray_synth"):
        check_kept(check_run(config, "plan"))
    assert "meanings.json was edited" in caplog.text


def test_a_finished_store_that_lost_images_is_filled_again_and_nothing_else(opened, caplog):
    config, folder = opened
    store = ImageStore(folder.child("images"))
    name = store.parts()[1]
    store.folder.write_bytes(name, b"PAR1")
    run = check_run(config)
    with caplog.at_level(logging.WARNING, "ray_synth"):
        check_kept(run)
    assert name in caplog.text
    assert run.todo("generation") == ["data", "quality", "generation"]
    begin(run)
    assert not folder.exists("stages/generation.json")
    assert folder.exists("stages/plan.json")


def test_force_says_which_images_it_deletes(opened, caplog):
    config, folder = opened
    run = check_run(config, "generation")
    with caplog.at_level(logging.WARNING, "ray_synth"):
        begin(run, "generation")
    assert "--force-stage generation deletes the 3 files of images" in caplog.text
    assert ImageStore(folder.child("images")).parts() == []


@pytest.mark.parametrize("text", ["", "{", "[1, 2]"])
def test_a_record_that_is_cut_off_is_named(opened, text):
    config, folder = opened
    folder.write_bytes("stages/plan.json", text.encode())
    with pytest.raises(UserError, match=r"stages/plan\.json is damaged .*delete it"):
        check_run(config)
