"""What a later run takes over, with Ray at work: pictures by their contents, images by their ids."""

import logging
import os

import pyarrow.parquet as pq
from samples import ROOT, encoded
from test_store import made
from test_take_over import CHOICES, Writer, begun, digits, finish, later

from ray_synth.config import Config, load_config
from ray_synth.generation.chunks import cut
from ray_synth.pipeline.take_over import taken_meanings
from ray_synth.pipeline.taken_images import take_images
from ray_synth.prompting.plan_file import PlanFile

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


def paint(run, plan: PlanFile) -> int:
    """Write an image of each row that the store lacks, in batches, as a pool of makers would."""
    missing = 0
    for chunk in cut(plan, run.store, 8):
        rows = plan.rows(chunk.start, chunk.stop)
        if chunk.missing:
            run.store.write(made(rows))
            missing += chunk.missing
    return missing


def test_only_missing_images_are_made_and_a_killed_command_goes_on(tmp_path, local_ray, caplog):
    first = begun(digits(tmp_path, "earlier", {name: name for name in CHOICES}, *SMALL))
    finish(first, CHOICES, Writer())
    assert paint(first, PlanFile(first.folder)) == 36
    before = {row["sample_id"]: row for row in stored(first)}
    classes = {"eight": "eight", "half a dozen": "six", "two": "two"}
    run = begun(later(tmp_path, classes, "take_over.renamed={six: half a dozen}", *SMALL))
    finish(run, {**CHOICES, "eight": "the number 8", "half a dozen": "?"}, Writer())
    parts, asked = [], []

    def killed(plan: PlanFile) -> int:
        run.store.write(made(plan.rows(0, 8)))
        raise KeyboardInterrupt

    try:
        take_images(run, killed)
    except KeyboardInterrupt:
        parts = run.store.parts()
    assert len(parts) == 1

    def make(plan: PlanFile) -> int:
        asked.extend(row["class_name"] for row in plan.rows(0, len(plan)))
        return paint(run, plan)

    with caplog.at_level(logging.INFO, "ray_synth"):
        assert take_images(run, make) == {"taken": 24, "made": 12}
    assert "24 of 36 images are those of" in caplog.text
    assert asked == ["eight"] * 4, "8 were made before the kill"
    rows = stored(run)
    assert sorted(row["sample_id"] for row in rows) == sorted(
        row["sample_id"] for row in PlanFile(run.folder).rows(0, 36)
    )
    for row in rows:
        assert row["class_name"] == list(classes)[row["class_index"]]
        if row["sample_id"] in before:
            assert row["image"] == before[row["sample_id"]]["image"]
    assert not os.path.exists(run.folder.path("missing"))
    assert all(chunk.missing == 0 for chunk in cut(PlanFile(run.folder), run.store, 8))
    assert take_images(run, make) == {"taken": 24, "made": 12}, "again: nothing changes"
    assert stored(run) == rows and asked == ["eight"] * 4


SMALL = ("generation.batch_size=8", "generation.checks.policy=off")


def stored(run) -> list[dict]:
    parts = (run.folder.path("images", name) for name in run.store.parts())
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    return sorted(rows, key=lambda row: row["sample_id"])


def test_pictures_that_were_replaced_are_found_by_their_contents(tmp_path, local_ray):
    """A folder may be renamed with its class; a class whose pictures changed is asked about anew."""
    for c, name in enumerate(("cat", "dog", "owl")):
        for part in ("train", "test"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                (tmp_path / part / name / f"{i}.png").write_bytes(encoded(10 * c + i))

    def config(name: str, *more: str) -> Config:
        sets = [
            f"data.{part}={{format: imagefolder, path: {tmp_path / part}}}"
            for part in ("train", "test")
        ]
        return load_config(
            QUICKSTART,
            [f"runs_dir={tmp_path / 'runs'}", f"name={name}", *sets, "data.class_names=null",
             "data.ood={}", "prompting.multiplier=4", *more],
        )  # fmt: skip

    choices = {name: f"a {name}" for name in ("cat", "dog", "owl")}
    first = finish(begun(config("earlier")), choices, Writer())
    for part in ("train", "test"):
        (tmp_path / part / "cat").rename(tmp_path / part / "tom")
    (tmp_path / "train" / "owl" / "1.png").write_bytes(encoded(99))
    run = begun(
        config("later", f"take_over.run={first.folder.uri}", "take_over.renamed={cat: tom}")
    )
    taken = taken_meanings(run, {})
    assert {name: entry["choice"] for name, entry in taken.items()} == {
        "dog": "a dog", "tom": "a cat"
    }  # fmt: skip
