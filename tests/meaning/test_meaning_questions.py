"""The questions about pictures of other packages, and the table of the rule's parts."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.meaning_parts import Rules, part_rows, part_table
from jobs.meaning_questions import PictureSet, Question, all_questions, load_sets
from ray_synth.errors import UserError
from ray_synth.meaning.background import Background
from ray_synth.meaning.candidates import Candidate
from ray_synth.meaning.lexicon import WordNet

SETS = load_sets()


def test_each_set_says_where_it_comes_from_and_asks_enough() -> None:
    assert len({some.name for some in SETS}) == len(SETS) == 3
    assert all(some.install and some.places and some.groups for some in SETS)
    assert sum(len(some.pictures) for some in SETS) >= 250


@pytest.mark.parametrize("some", SETS, ids=lambda some: some.name)
def test_what_a_picture_shows_are_some_of_wordnets_senses_and_not_all(some: PictureSet) -> None:
    try:
        wordnet = WordNet()
    except UserError:
        pytest.skip("WordNet is not installed: apt-get install wordnet-base")
    for name, shown in some.pictures.items():
        senses = wordnet.candidates(name)
        assert 0 < len(set(shown.shows)) < len(senses), name
        assert max(shown.shows) < len(senses), name


class Lexicon:
    """Two senses of any name."""

    def candidates(self, name: str) -> list[Candidate]:
        return [Candidate(f"a red {name}", "lexicon"), Candidate(f"a blue {name}", "lexicon")]


class Colours:
    """Its embedding of an image is its mean colour; of a text, the colour that it says."""

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        rows = np.stack([np.asarray(image, float).mean(axis=(0, 1)) + 1 for image in images])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.array([[1.0, 0, 0] if "red" in text else [0, 0, 1.0] for text in texts])


def pictures_in(folder: Path) -> list[PictureSet]:
    """A set of two names, one with a folder of files, and a set that is not there."""
    (folder / "a" / "car").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (200, 10 * i, 0)).save(folder / "a" / "car" / f"{i}.png")
    Image.new("RGB", (8, 8), (0, 0, 200)).save(folder / "a" / "boat.png")
    names = {"car": {"file": "car", "shows": [0]}, "boat": {"file": "boat.png", "shows": [1]}}
    here = {"name": "here", "install": "x", "places": ["a"], "groups": {1: 2, 3: 1}}
    there = {**here, "name": "there", "install": "npm pack them", "places": ["b"]}
    return [PictureSet(**some, pictures=names) for some in (here, there)]  # type: ignore[arg-type]


def test_questions_are_of_groups_of_images_and_know_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ray_synth"):
        found = dict(all_questions(pictures_in(tmp_path), tmp_path, Colours(), Lexicon()))  # type: ignore[arg-type]
    assert "no there in" in caplog.text and "npm pack them" in caplog.text
    assert list(found) == ["here, 1 image", "here, 3 images"]
    asked = [(q.class_name, len(q.images), q.others.count) for q in found["here, 1 image"]]
    assert asked == [("car", 1, 1), ("car", 1, 1), ("boat", 1, 3)]
    assert [q.class_name for q in found["here, 3 images"]] == ["car"]
    assert found["here, 1 image"][0].right == {"a red car"}


def test_each_part_of_the_rule_is_left_out_once(tmp_path: Path) -> None:
    clip = Colours()
    found = dict(all_questions(pictures_in(tmp_path)[:1], tmp_path, clip, Lexicon()))  # type: ignore[arg-type]
    shipped = Background.of(np.eye(3))
    rows = part_rows(found, Rules(clip.encode_texts, shipped))
    by_rule = {row.pop("rule"): row for row in rows}
    assert by_rule["chance"] == {"here, 1 image": 50, "here, 3 images": 50}
    assert by_rule["the rule"] == {"here, 1 image": 100, "here, 3 images": 100}
    assert len(by_rule) == 10
    table = part_table([{"rule": rule, **row} for rule, row in by_rule.items()])
    assert "| the rule | 100.0% | 100.0% |" in table


def test_the_bare_name_won_before_and_resolved_nothing() -> None:
    """The paper's rule with the name among the candidates, to compare with."""

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[1.0, 0] if "a crane" in text else [0.9, 0.436] for text in texts])

    senses = [Candidate("a large bird", "lexicon"), Candidate("a tall machine", "lexicon")]
    others = Background.of(np.array([[1.0, 0], [0.98, 0.2]]))
    question = Question("crane", np.array([[1.0, 0]]), others, senses, [0])
    rules = Rules(embed, others)  # type: ignore[arg-type]
    assert rules.before(question)[0] == "crane"
    assert rules.whole(question)[0] == "a large bird"
