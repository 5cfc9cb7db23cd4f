"""Budgets of the next round: exact, with a floor, by more than chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_synth.training.needs import (
    class_images,
    class_weakness,
    confused_pairs,
    item_draws,
    kind_mix,
    usefulness,
    weakest,
)


def seen(images: int, wrong: int, doubt: float | None = None) -> dict:
    error = wrong / images if images else 0.0
    return {"images": images, "error": error, "doubt": error if doubt is None else doubt}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 500), st.floats(0, 1))
def test_every_image_is_given_and_the_floor_holds(weakness, more, floor):
    total = len(weakness) + more
    found = class_images(total, np.array(weakness), floor)
    assert found.sum() == total
    assert found.min() >= max(1, int(floor * total / len(weakness)))
    order = np.argsort(weakness)
    assert (np.diff(found[order]) >= -1).all(), "a weaker class has at least as many"
    assert (found == class_images(total, np.array(weakness), floor)).all()


def test_with_a_floor_of_1_all_get_alike():
    assert class_images(30, np.array([0.9, 0.1, 0.5]), 1.0).tolist() == [10, 10, 10]


def test_a_weak_class_gets_more_by_how_weak_it_is():
    found = class_images(400, np.array([0.6, 0.2]), 0.0)
    assert found[0] > 2.9 * found[1]


def test_few_images_say_little():
    many = class_weakness([seen(200, 100), seen(200, 10), seen(200, 10)])
    few = class_weakness([seen(2, 1), seen(200, 10), seen(200, 10)])
    assert many[0] == pytest.approx(0.5, abs=0.02)
    assert few[0] < many[0]
    assert few[0] > few[1]


def test_a_class_without_images_is_as_the_others_are():
    found = class_weakness([seen(0, 0), seen(50, 10), seen(50, 10)])
    assert found[0] == pytest.approx(0.2)


def test_differences_that_are_chance_hardly_count():
    """1,000 classes of 10 images, all as hard: no class gets more than 1.5 of the mean."""
    rng = np.random.default_rng(0)
    classes = [seen(10, int(wrong)) for wrong in rng.binomial(10, 0.3, 1000)]
    raw = np.array([item["doubt"] for item in classes])
    found = class_weakness(classes)
    assert raw.max() > 2.3 * raw.mean()
    assert found.max() < 1.6 * found.mean()


def test_nothing_known_is_all_alike():
    assert (class_weakness([seen(0, 0)] * 3) == 0.5).all()


def test_kinds_that_are_hard_and_right_get_more():
    synthetic = {
        "kind": {
            "plain": {"images": 300, "entropy": 0.1},
            "stylized": {"images": 300, "entropy": 0.9},
            "contextual": {"images": 300, "entropy": 0.9},
        },
        "accepted": {
            "kind": {"plain": [300, 300], "stylized": [300, 300], "contextual": [300, 3000]}
        },
    }
    mix = kind_mix({"plain": 1.0, "stylized": 1.0, "contextual": 1.0}, synthetic, 0.3)
    assert mix["stylized"] > 2 * mix["plain"]
    assert mix["stylized"] > 2 * mix["contextual"], "most of its images are refused"
    assert min(mix.values()) >= 0.3
    alike = kind_mix({"plain": 2.0, "stylized": 1.0}, synthetic, 1.0)
    assert alike == {"plain": 2.0, "stylized": 1.0}


def test_styles_are_drawn_by_what_they_are_worth_and_none_is_left_out():
    synthetic = {
        "style": {"ink": {"images": 100, "entropy": 1.0}, "oil": {"images": 100, "entropy": 0.0}},
        "accepted": {"style": {"ink": [100, 100], "oil": [100, 100]}},
    }
    given = synthetic["style"], synthetic["accepted"]["style"]
    ink, oil, new = item_draws(["ink", "oil", "new"], *given, 0.2)
    assert ink == 8
    assert 1 <= oil < new < ink


def test_unseen_values_are_worth_what_is_usual():
    assert (usefulness({}, {}, ["a", "b"]) == 1).all()


def test_pairs_are_those_that_are_taken_for_each_other():
    classes = [
        {"class_name": "crane", "confused": [["heron", 0.4, 3], ["owl", 0.1, 0]]},
        {"class_name": "owl", "confused": [["crane", 0.01, 0]]},
        {"class_name": "wren"},
    ]
    assert confused_pairs(classes) == {"crane": "heron"}


def test_the_weakest_tenth():
    assert weakest(np.array([0.1, 0.9, 0.5])) == [1]
    assert weakest(np.linspace(0, 1, 20)) == [19, 18]
