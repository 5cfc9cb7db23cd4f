"""Rounds of a plan: how they are cut, that no id comes twice, and the files that keep them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import arguments, classes

from ray_synth.config import PracticeConfig
from ray_synth.errors import UserError
from ray_synth.prompting.plan import make_plan, plan_tables
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.prompting.rounds import (
    check_rounds,
    clear_rounds,
    cut_rounds,
    join_rounds,
    learner_folder,
    read_rounds,
    round_card,
    round_file,
    steering_learner,
    write_round,
)
from ray_synth.storage.folder import Folder


@given(
    st.integers(2, 8),
    st.integers(1, 20),
    st.integers(8, 400),
    st.floats(0.1, 0.9),
    st.integers(0, 999),
)
def test_rounds_share_out_all_images_and_all_steps(rounds, classes, steps, first, more):
    planned = 20 * rounds * classes + more
    try:
        cut = cut_rounds(PracticeConfig(rounds=rounds, first=first), planned, classes, 10 * steps)
    except UserError:
        return
    assert sum(cut.images) == planned
    assert len(cut.images) == len(cut.stops) == rounds
    assert cut.stops[-1] == 10 * steps
    assert (np.diff([0, *cut.stops]) >= 1).all()
    assert min(cut.images) >= classes


def test_a_round_of_fewer_images_than_classes_is_refused():
    with pytest.raises(UserError, match=r"round 0 of 4 has 10 of 100 images, fewer than the 20"):
        cut_rounds(PracticeConfig(rounds=4, first=0.1), 100, 20, 100)
    with pytest.raises(UserError, match=r"round 3 of 4 has 6 of 100 .*a smaller first"):
        cut_rounds(PracticeConfig(rounds=4, first=0.8), 100, 7, 100)


def test_too_few_steps_are_refused():
    with pytest.raises(UserError, match="3 optimizer steps cannot be cut into 4 parts"):
        cut_rounds(PracticeConfig(rounds=4), 400, 10, 3)


def test_round_0_is_the_start_of_the_plan_without_rounds():
    whole = make_plan(classes(3), **arguments(60))
    first = make_plan(classes(3), **arguments(20))
    assert first.equals(whole.slice(0, 20))


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(0, 5))
def test_later_rounds_go_on_and_no_id_comes_twice(budgets, seed):
    known = classes(3)
    first = make_plan(known, **arguments(12, seed=seed))
    before = np.bincount(first["class_index"].to_numpy(), minlength=3)
    more = {"budgets": np.array(budgets), "number": 1, "before": before}
    second = make_plan(known, **arguments(sum(budgets), seed=seed), **more)
    third = make_plan(
        known,
        **arguments(sum(budgets), seed=seed),
        budgets=np.array(budgets),
        number=2,
        before=before + np.array(budgets),
    )
    counts = np.bincount(second["class_index"].to_numpy(), minlength=3)
    assert counts.tolist() == budgets
    ids = [i for part in (first, second, third) for i in part["sample_id"].to_pylist()]
    seeds = [i for part in (first, second, third) for i in part["seed"].to_pylist()]
    assert len(set(ids)) == len(ids)
    # The row's number decides its seed, as in a plan of one piece.
    longest = make_plan(known, **arguments(3 * 30, seed=seed))
    assert set(seeds) <= set(longest["seed"].to_pylist())
    assert len(set(seeds)) == len(seeds)


def told_apart(in_words: bool, limit: int = 64, count: int = 8):
    from dataclasses import replace

    known = classes(2)
    known[0] = replace(known[0], unlike="a heron")
    given = {**arguments(count, limit=limit), "negative_prompt": "blurry"}
    return make_plan(known, **given, unlike_in_words=in_words).to_pylist()


def test_half_of_a_confused_classes_rows_say_what_it_is_not():
    rows = told_apart(in_words=False, count=400)
    mine = [row for row in rows if row["class_index"] == 0]
    assert {row["negative_prompt"] for row in mine} == {"blurry", "blurry, a heron"}
    assert {row["negative_prompt"] for row in rows if row["class_index"] == 1} == {"blurry"}
    for kind in {row["kind"] for row in mine}:  # they take turns: no kind alone says so
        of_kind = [row["negative_prompt"] for row in mine if row["kind"] == kind]
        assert 0.3 < of_kind.count("blurry, a heron") / len(of_kind) < 0.7
    in_words = told_apart(in_words=True, count=400)
    assert {row["negative_prompt"] for row in in_words} == {"blurry"}
    for row, other in zip(rows, in_words, strict=True):
        assert other["prompt"].endswith(", not a heron") == ("heron" in row["negative_prompt"])


def test_what_the_encoder_would_not_read_is_left_out():
    mine = [row for row in told_apart(in_words=True, limit=9) if row["class_index"] == 0]
    assert all(len(row["prompt"].split()) + 2 <= 9 for row in mine)


def written(folder: Folder, number: int, before: int, token: str = "t"):
    tables = plan_tables(
        classes(3), **arguments(9), number=number, before=np.full(3, before), table_rows=4
    )
    return write_round(folder, number, tables, {"token": token} if number else {})


def test_the_joined_plan_is_all_rounds_and_damage_is_found(tmp_path):
    folder = Folder(tmp_path)
    cards = [written(folder, number, 3 * number) for number in range(3)]
    assert cards[1]["by_class"] == {"0": 3, "1": 3, "2": 3}
    assert read_rounds(folder, "t") == cards
    assert read_rounds(folder, "another training") == cards[:1]
    join_rounds(folder, cards)
    plan = PlanFile(folder)
    assert len(plan) == 27
    own = [i for n in range(3) for i in folder.read_table(round_file(n))["sample_id"].to_pylist()]
    assert plan.ids_of(0, 27) == own
    check_rounds(folder)
    folder.delete(round_card(1))  # killed before the card was written: the round is not there
    assert read_rounds(folder) == cards[:1]
    folder.write_table(round_file(0), folder.read_table(round_file(2)))
    with pytest.raises(UserError, match=r"round-000\.parquet is damaged"):
        check_rounds(folder)
    clear_rounds(folder)
    assert read_rounds(folder) == []
    assert not folder.exists(round_file(2))


def test_each_later_round_is_steered_by_the_learner_before_it():
    assert steering_learner(0) is None
    assert steering_learner(3) == learner_folder(2) == "practice/learner-002"
