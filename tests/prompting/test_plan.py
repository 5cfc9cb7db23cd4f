"""The plan: exact size, balanced prefixes, nested multiples, prompts within the encoder's reach."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_synth.prompting import plan as planning
from ray_synth.prompting.contexts import Context
from ray_synth.prompting.plan import ClassPrompts, kinds, make_plan, plan_tables, sample_id
from ray_synth.prompting.plan_file import PLAN_SCHEMA
from ray_synth.prompting.styles import load_styles

STYLES = load_styles()
GOLDEN = [
    ("e9b441259def8908c58e6ba9", 1, "oil painting", 144122146634080),
    ("1d229bb10c7ddd0b8e900345", 0, "ukiyo-e woodblock print", 255105144104808),
    ("f7dc20e641e4b3e33b8d1f36", 2, "pixel art", 185328785128620),
]
GOLDEN_ID = "c3c0126239473e63537949ae"
MIX = {"plain": 1.0, "contextual": 1.0, "stylized": 1.0}


def classes(count: int) -> list[ClassPrompts]:
    contexts = [
        (Context("", f"in room {i}", "in soft light", "from above"), ["llm", "pool"][i % 2])
        for i in range(4)
    ]
    return [ClassPrompts(i, f"name{i}", f"the thing {i}", contexts) for i in range(count)]


def guided(count: int) -> list[ClassPrompts]:
    """Classes of 0, 1, 2, ... reference images."""
    return [
        replace(known, references=[f"{i}/{j}.png" for j in range(i)])
        for i, known in enumerate(classes(count))
    ]


def arguments(num_images, *, mix=None, seed=0, limit=64, fingerprint="g"):
    return {
        "num_images": num_images,
        "mix": mix or MIX,
        "styles": STYLES,
        "negative_prompt": "",
        "fingerprint": fingerprint,
        "seed": seed,
        "count_tokens": lambda text: len(text.split()) + 2,
        "max_tokens": limit,
    }


def plan(count=3, num_images=30, **changes):
    return make_plan(classes(count), **arguments(num_images, **changes))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 80), st.integers(0, 99))
def test_every_prefix_is_balanced_over_classes(count, num_images, seed):
    names = plan(count, num_images, seed=seed)["class_index"].to_pylist()
    assert len(names) == num_images
    for end in range(count, num_images + 1):
        counts = Counter(names[:end])
        assert max(counts.values()) - min(counts.get(i, 0) for i in range(count)) <= 1


@settings(max_examples=20, deadline=None)
@given(
    st.integers(2, 5), st.integers(1, 100), st.integers(2, 6), st.sampled_from([classes, guided])
)
def test_one_times_is_the_beginning_of_six_times(count, num_images, times, make):
    small = make_plan(make(count), **arguments(num_images))
    large = make_plan(make(count), **arguments(num_images * times))
    assert large.slice(0, num_images).equals(small)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(0, 150),
    st.integers(1, 40),
    st.integers(0, 9),
    st.sampled_from([MIX, {"stylized": 1.0}, {"contextual": 0.9, "plain": 0.1}]),
)
def test_tables_of_any_size_together_are_the_whole_plan(count, num_images, table_rows, seed, mix):
    given_ = arguments(num_images, mix=mix, seed=seed)
    tables = list(plan_tables(guided(count), **given_, table_rows=table_rows))
    assert [table.num_rows for table in tables[:-1]] == [table_rows] * (len(tables) - 1)
    assert all(table.schema.equals(PLAN_SCHEMA) and table.num_rows for table in tables)
    whole = make_plan(guided(count), **given_)
    assert whole.num_rows == num_images
    assert pa.concat_tables([PLAN_SCHEMA.empty_table(), *tables]).equals(whole)


def test_a_plan_is_the_same_in_every_version():
    """Runs continue on their plans, and images are known by these ids."""
    rows = plan(3, 300, seed=5, mix={"contextual": 1.0, "stylized": 2.0}).to_pylist()
    shown = [(row["sample_id"], row["class_index"], row["style"], row["seed"]) for row in rows]
    assert [shown[0], shown[150], shown[299]] == GOLDEN
    assert sample_id("a photo", "blurry", 7, "g") == GOLDEN_ID


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.integers(0, 9))
def test_each_class_gets_its_budget_and_every_prefix_its_share(budgets, seed):
    given_ = arguments(sum(budgets), seed=seed) | {"budgets": np.array(budgets)}
    rows = make_plan(guided(len(budgets)), **given_).to_pylist()
    found = Counter(row["class_index"] for row in rows)
    assert [found[index] for index in range(len(budgets))] == budgets
    for end in range(0, len(rows), 7):
        counts = Counter(row["class_index"] for row in rows[:end])
        for index, budget in enumerate(budgets):
            assert abs(counts[index] - budget * end / len(rows)) <= len(budgets) / 2 + 1
    # a class's rows are those it has in any other plan
    alone = make_plan(guided(len(budgets)), **arguments(len(budgets) * max(budgets), seed=seed))
    of_class = [row["sample_id"] for row in alone.to_pylist() if row["class_index"] == 0]
    mine = [row["sample_id"] for row in rows if row["class_index"] == 0]
    assert mine == of_class[: len(mine)]


@pytest.mark.parametrize("kept", [0, 1, 1000])
def test_prompts_are_the_same_however_many_are_remembered(monkeypatch, kept):
    whole = plan(4, 200)
    monkeypatch.setattr(planning, "PROMPTS_KEPT", kept)
    assert plan(4, 200).equals(whole)


def test_a_prompt_is_written_once_however_often_it_is_used():
    counted: Counter[str] = Counter()

    def count_tokens(text):
        counted[text] += 1
        return 1

    given_ = arguments(400, mix={"plain": 1.0}) | {"count_tokens": count_tokens}
    make_plan(classes(4), **given_)
    assert len(counted) == 4 and set(counted.values()) == {1}


@given(
    st.dictionaries(
        st.sampled_from(["plain", "contextual", "stylized"]), st.floats(0.1, 5), min_size=1
    ),
    st.integers(1, 200),
)
def test_kinds_keep_their_shares_in_every_prefix(mix, rounds):
    found = list(itertools.islice(kinds(mix), rounds))
    total = sum(mix.values())
    for end in range(1, rounds + 1):
        counts = Counter(kind for kind, _ in found[:end])
        for kind, share in mix.items():
            assert abs(counts[kind] - end * share / total) < len(mix)
    for kind in mix:
        assert [turn for k, turn in found if k == kind] == list(
            range(Counter(k for k, _ in found)[kind])
        )


def test_ids_and_seeds_are_unique_and_say_what_makes_the_image():
    table = plan(4, 200)
    rows = table.to_pylist()
    assert len({row["seed"] for row in rows}) == 200
    for row in rows[:20]:
        assert row["sample_id"] == sample_id(row["prompt"], "", row["seed"], "g")
    assert not set(plan(4, 200, fingerprint="other")["sample_id"].to_pylist()) & set(
        table["sample_id"].to_pylist()
    )
    assert plan(4, 200).equals(table)
    assert not plan(4, 200, seed=1).equals(table)


def test_two_rows_of_one_id_are_refused():
    twins = [ClassPrompts(0, "crane", "a bird", [])] * 2
    with pytest.raises(AssertionError, match="sample_id"):
        make_plan(twins, **arguments(10))


def test_each_row_of_a_class_with_references_is_guided_by_one_used_equally_often():
    rows = make_plan(guided(4), **arguments(4 * 30)).to_pylist()
    for index in range(4):
        used = Counter(row["reference"] for row in rows if row["class_index"] == index)
        names = [f"{index}/{j}.png" for j in range(index)] or [""]
        assert used == dict.fromkeys(names, 30 // len(names))
    turns = [row["reference"] for row in rows if row["class_index"] == 3]
    passes = [turns[first : first + 3] for first in range(0, 30, 3)]
    for number, names in enumerate(passes):
        order = np.random.default_rng((0, 3, 3, number)).permutation(3)
        assert names == [f"3/{j}.png" for j in order]


def test_ids_cover_the_reference_and_nothing_else_changes_with_it():
    bare, with_images = (
        make_plan(make(4), **arguments(40)).to_pylist() for make in (classes, guided)
    )
    for row, other in zip(bare, with_images, strict=True):
        changed = {"sample_id", "reference"} if other["reference"] else set()
        assert {key for key in row if row[key] != other[key]} == changed
        assert other["sample_id"] == sample_id(
            other["prompt"], "", other["seed"], "g", other["reference"]
        )
    ids = {sample_id("a", "", 1, "g", reference) for reference in ["", "x", "y"]}
    assert len(ids) == 3 and sample_id("a", "", 1, "g", "") == sample_id("a", "", 1, "g")


def test_rows_say_where_their_context_came_from():
    rows = plan(2, 120).to_pylist()
    assert {row["context_source"] for row in rows if row["kind"] == "plain"} == {"none"}
    assert {row["context_source"] for row in rows if row["kind"] == "contextual"} == {"llm", "pool"}
    assert all(bool(row["style"]) == (row["kind"] == "stylized") for row in rows)
    assert Counter(row["kind"] for row in rows) == {"plain": 40, "contextual": 40, "stylized": 40}


def test_styles_are_used_equally_often():
    rows = plan(1, len(STYLES) * 2, mix={"stylized": 1.0}).to_pylist()
    assert set(Counter(row["style"] for row in rows).values()) == {2}


@pytest.mark.parametrize("limit", [8, 12, 20, 64])
def test_prompts_stay_within_the_text_encoders_reach_and_keep_the_meaning(limit):
    for row in plan(2, 60, limit=limit).to_pylist():
        assert len(row["prompt"].split()) + 2 <= limit or row["kind"] == "stylized"
        assert "thing" in row["prompt"] or limit < 10


def test_rows_are_counted_by_what_their_prompt_lost():
    known = classes(3)
    known[0] = replace(known[0], meaning="very " * 40 + "long")
    known[1] = replace(known[1], class_name="name " * 40)
    shortened = Counter()
    settings = arguments(30, mix={"plain": 1.0}, limit=20)
    tables = list(plan_tables(known, table_rows=7, shortened=shortened, **settings))
    assert shortened == {"meaning": 10, "name": 10}
    assert all(
        len(text.split()) + 2 <= 20 for table in tables for text in table["prompt"].to_pylist()
    )
