"""An image made again from its row: the same pixels, or a plain word about why not."""

import json

import pyarrow as pa
import pytest
from painting import Painter
from test_store import plan_rows

from ray_synth.cli.command import main
from ray_synth.config import GenerationConfig, load_config
from ray_synth.errors import UserError
from ray_synth.generation.maker import GenerationJob, ImageMaker, write_references
from ray_synth.generation.regenerate import as_made, regenerate
from ray_synth.generation.store import IMAGE_SCHEMA, ImageStore
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
from ray_synth.storage.folder import Folder

PAINTED = {"generator": "painting:Painter", "width": 16, "height": 16, "image_format": "png"}
EMBEDDED = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 3.0}


def run_of(tmp_path, generation, rows, steering=(), **changes):
    """A run directory as the pipeline leaves it, with these rows made in batches of 4."""
    from small_runs import QUICKSTART

    folder = Folder(tmp_path / "run")
    config = load_config(QUICKSTART)
    made = GenerationConfig.model_validate({**generation, "batch_size": 4, **changes})
    values = config.model_copy(update={"generation": made}).model_dump(mode="json")
    folder.write_yaml("config.yaml", {**values, "versions": {"ray": "0"}})
    write_references(folder, {"cat/1": _reference(1), "cat/2": _reference(2)})
    plan = PlanTable(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
    store = ImageStore(folder.child("images"))
    maker = ImageMaker(GenerationJob(made, plan, store, run=folder, steering=steering))
    for start in range(0, len(rows), 4):
        maker.chunk(start, min(start + 4, len(rows)), [])
    return folder


def _reference(seed):
    from samples import encoded

    return encoded(seed)


def test_the_embedded_model_gives_the_same_pixels_alone(tmp_path):
    """Also one of a part of two rows, padded; and in webp, since pixels are compared as stored."""
    run = run_of(tmp_path, EMBEDDED, plan_rows(6), checks={"policy": "off"})
    for sample_id in ("000001", "000005"):
        found = regenerate(run, sample_id)
        assert found.identical, found.describe()
        assert "the same pixels" in found.describe()


def test_a_guided_image_is_made_again_from_the_reference_that_the_run_kept(tmp_path):
    rows = [{**row, "reference": f"cat/{1 + i % 2}"} for i, row in enumerate(plan_rows(3))]
    run = run_of(tmp_path, EMBEDDED, rows, checks={"policy": "off"}, reference={"strength": 0.6})
    assert regenerate(run, "000001").identical


def test_an_image_of_a_later_attempt_is_made_with_that_attempts_seed(tmp_path):
    rows = plan_rows(4)
    run = run_of(
        tmp_path, PAINTED, rows, checks={"policy": "retry", "clip": False},
        generator_kwargs={"blank_seeds": [rows[2]["seed"]]},
    )  # fmt: skip
    found = regenerate(run, "000002")
    assert found.row["attempt"] == 1
    assert found.identical


def test_other_pixels_are_counted(tmp_path, monkeypatch):
    run = run_of(tmp_path, PAINTED, plan_rows(4), checks={"policy": "off"})
    paint = Painter.generate
    monkeypatch.setattr(
        Painter,
        "generate",
        lambda self, rows: [image.point(lambda v: v ^ 1) for image in paint(self, rows)],
    )
    found = regenerate(run, "000000")
    assert (found.different, found.largest) == (16 * 16 * 3, 1)
    assert "768 pixel values differ" in found.describe()


def test_what_the_config_left_open_is_taken_from_the_row():
    config = GenerationConfig(batch_size="auto")
    facts = {"batch_size": 24, "dtype": "bfloat16", "compile": True, "num_threads": None}
    again = as_made(config, facts)
    assert (again.batch_size, again.dtype, again.compile) == (24, "bfloat16", True)
    assert again.num_threads == config.num_threads


@pytest.mark.parametrize(("sample_id", "says"), [("ffff", "no image"), ("0000", "several images")])
def test_an_unclear_id_is_refused(tmp_path, sample_id, says):
    run = run_of(tmp_path, PAINTED, plan_rows(2), checks={"policy": "off"})
    with pytest.raises(ValueError, match=says):
        regenerate(run, sample_id)


def test_another_model_of_the_same_name_is_refused(tmp_path):
    run = run_of(tmp_path, PAINTED, plan_rows(2), checks={"policy": "off"})
    config = run.read_bytes("config.yaml").replace(b"width: 16", b"width: 24")
    run.write_bytes("config.yaml", config)
    with pytest.raises(ValueError, match="other weights or settings"):
        regenerate(run, "000000")


def test_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run at"):
        regenerate(Folder(tmp_path), "0")


def edit_row(run, **changes):
    """The first stored part, its first row as somebody changed it, under its old name."""
    store = ImageStore(run.child("images"))
    name = store.parts()[0]
    rows = store.read(name).to_pylist()
    store.folder.write_table(
        name, pa.Table.from_pylist([{**rows[0], **changes}, *rows[1:]], schema=IMAGE_SCHEMA)
    )
    return changes.get("sample_id") or rows[0]["sample_id"]


@pytest.mark.parametrize("sample_id", ["../../x", "/etc/x", "a/b", "..", "x\n", "a" * 300])
def test_a_row_whose_id_names_a_place_writes_nothing(tmp_path, sample_id, monkeypatch):
    run = run_of(tmp_path, PAINTED, plan_rows(4), checks={"policy": "off"})
    edit_row(run, sample_id=sample_id)
    (tmp_path / "deep" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "here")
    before = sorted(tmp_path.rglob("*"))
    line = ["regenerate", "--run", run.uri, "--", sample_id]
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code
    after = [path for path in sorted(tmp_path.rglob("*")) if "damaged" not in path.parts]
    assert after == before


HOSTILE = {
    "threads": {"num_threads": 10**9},
    "no threads": {"num_threads": -1},
    "threads in words": {"num_threads": "many"},
    "batch": {"batch_size": 10**9},
    "a true batch": {"batch_size": True},
    "dtype": {"dtype": "os.system"},
    "compile": {"compile": {"mode": "x"}},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_row_that_asks_for_too_much_builds_no_model(tmp_path, kind, monkeypatch):
    run = run_of(tmp_path, PAINTED, plan_rows(4), checks={"policy": "off"})
    row = ImageStore(run.child("images")).read(ImageStore(run.child("images")).parts()[0])
    facts = json.loads(row["generator"][0].as_py())
    sample_id = edit_row(run, generator=json.dumps({**facts, **HOSTILE[kind]}))
    monkeypatch.setattr(Painter, "__init__", None)
    with pytest.raises(UserError, match="the stored row"):
        regenerate(run, sample_id)


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"seed": 2**62}, {"seed": None}, {"attempt": 10**9}, {"class_index": -5},
     {"prompt": None}, {"prompt": "x" * 200_000}, {"generator": "{"}, {"generator": "[]"},
     {"generator": "{}"}, {"generator": None}],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_named(tmp_path, change, monkeypatch):
    run = run_of(tmp_path, PAINTED, plan_rows(4), checks={"policy": "off"})
    sample_id = edit_row(run, **change)
    monkeypatch.setattr(Painter, "__init__", None)
    with pytest.raises(UserError, match=f"stored row .*{sample_id}"):
        regenerate(run, sample_id)


def test_a_row_that_names_a_reference_that_is_not_kept_is_told(tmp_path):
    run = run_of(tmp_path, PAINTED, plan_rows(4), checks={"policy": "off"})
    sample_id = edit_row(run, reference="../../etc/passwd")
    with pytest.raises(UserError, match="keeps no image"):
        regenerate(run, sample_id)
