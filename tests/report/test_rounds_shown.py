"""Rounds on the page and in the status: what was weak, what was made for it, what came of it."""

import numpy as np
import pyarrow as pa
import pytest
from samples import encoded

from ray_synth.prompting.plan_file import PLAN_SCHEMA
from ray_synth.prompting.rounds import examples_file, scores_file, write_round
from ray_synth.report.page import render_report
from ray_synth.report.rounds import rounds_of
from ray_synth.report.status import read_status
from ray_synth.storage.folder import Folder
from ray_synth.training.scores import packed

NAMES = ("crane", "heron", "<b>owl</b>")


def scores(folder: Folder, number: int, errors: tuple[float, ...], right: int) -> None:
    classes = [
        {"class_name": name, "images": 100, "error": error}
        for name, error in zip(NAMES, errors, strict=True)
    ]
    real = {
        "set": "validation", "looked_at": 300, "right": packed(np.arange(300) < right),
        "classes": classes,
    }  # fmt: skip
    folder.write_json(scores_file(number), {"real": real, "steps": 50 * (number + 1)})


@pytest.fixture
def run(tmp_path) -> Folder:
    """Two of three rounds, both scored."""
    folder = Folder(tmp_path)
    folder.write_yaml("config.yaml", {"name": "birds", "prompting": {"practice": {"rounds": 3}}})
    rows = [
        {**{f.name: 0 if f.type == pa.int64() else "" for f in PLAN_SCHEMA}, "sample_id": f"{i}",
         "class_index": i % 3}
        for i in range(6)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)
    folder.write_table("plan.parquet", table)
    write_round(folder, 0, [table], {})
    card = {
        "token": "t", "weakness": dict(zip(NAMES, (0.6, 0.2, 0.1), strict=True)),
        "budgets": dict(zip(NAMES, (4, 1, 1), strict=True)), "mix": {"plain": 1.0, "stylized": 3.0},
        "styles": {"ink": 8, "oil": 2, "chalk": 4, "neon": 1}, "confused": {"crane": "heron"},
        "new_contexts": ["crane"],
        "steering": {"learner": "practice/learner-000", "guidance": {"scale": 0.2}, "factor": 4},
    }  # fmt: skip
    write_round(folder, 1, [table], card)
    scores(folder, 0, (0.6, 0.2, 0.1), 180)
    scores(folder, 1, (0.3, 0.2, 0.2), 240)
    example = {
        "sample_id": "0", "class_name": "crane", "prompt": "a photo of a crane <i>",
        "negative_prompt": "a heron", "image": encoded(1),
    }  # fmt: skip
    broken = {**example, "image": b"nothing"}
    folder.write_table(examples_file(1), pa.Table.from_pylist([example, broken]))
    return folder


def test_a_round_says_what_was_weak_and_what_came_of_it(run):
    first, second = rounds_of(run)
    assert first["weak"] == []
    assert first["change"] is None
    weak = second["weak"][0]
    assert weak == {"name": "crane", "images": 4, "before": 60.0, "after": 30.0}
    assert second["top1"] == pytest.approx(80.0)
    assert second["change"]["top1"] == pytest.approx(20.0)
    assert second["styles"] == ["ink", "chalk", "oil"]
    assert second["kinds"] == [("plain", 25.0), ("stylized", 75.0)]


def test_the_page_shows_rounds_with_pictures_and_escapes_names(run):
    page = render_report(run)
    assert "Weakest before" in page
    assert "Told apart: crane from heron" in page
    assert "New scenes for crane" in page
    assert "unsure of (scale 0.2); of 4 images each the hardest that is right." in page
    assert "<b>owl</b>" not in page
    assert "crane <i>" not in page
    assert page.count('alt="synthetic image of crane, round 1"') == 1
    assert "80.0% at step 100" in page


def test_a_run_without_rounds_shows_none(tmp_path):
    folder = Folder(tmp_path)
    folder.write_yaml("config.yaml", {"name": "plain"})
    assert rounds_of(folder) == []
    assert 'id="rounds"' not in render_report(folder)


def test_a_round_that_is_not_scored_yet_is_shown(run):
    run.delete(scores_file(1))
    second = rounds_of(run)[1]
    assert second["top1"] is None
    assert second["weak"][0]["after"] is None
    assert "Round 1" in render_report(run)


def test_the_status_says_which_round_it_is(run):
    generation = next(stage for stage in read_status(run).stages if stage.name == "generation")
    assert generation.note.startswith("round 2 of 3:")
