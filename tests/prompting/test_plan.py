"""The plan: exact size, balanced prefixes, nested multiples, prompts within the encoder's reach."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_synth.prompting.contexts import Context
from ray_synth.prompting.plan import ClassPrompts, kinds, make_plan, sample_id
from ray_synth.prompting.styles import load_styles

STYLES = load_styles()
MIX = {"plain": 1.0, "contextual": 1.0, "stylized": 1.0}


def classes(count: int) -> list[ClassPrompts]:
    contexts = [
        (Context("", f"in room {i}", "in soft light", "from above"), ["llm", "pool"][i % 2])
        for i in range(4)
    ]
    return [ClassPrompts(i, f"name{i}", f"the thing {i}", contexts) for i in range(count)]


def plan(count=3, num_images=30, *, mix=None, seed=0, limit=64, fingerprint="g"):
    return make_plan(
        classes(count),
        num_images=num_images,
        mix=mix or MIX,
        styles=STYLES,
        negative_prompt="",
        fingerprint=fingerprint,
        seed=seed,
        count_tokens=lambda text: len(text.split()) + 2,
        max_tokens=limit,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 80), st.integers(0, 99))
def test_every_prefix_is_balanced_over_classes(count, num_images, seed):
    names = plan(count, num_images, seed=seed)["class_index"].to_pylist()
    assert len(names) == num_images
    for end in range(count, num_images + 1):
        counts = Counter(names[:end])
        assert max(counts.values()) - min(counts.get(i, 0) for i in range(count)) <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(1, 20), st.integers(2, 6))
def test_one_times_is_the_beginning_of_six_times(count, per_class, times):
    small = plan(count, count * per_class).to_pylist()
    assert plan(count, count * per_class * times).to_pylist()[: len(small)] == small


@given(
    st.dictionaries(
        st.sampled_from(["plain", "contextual", "stylized"]), st.floats(0.1, 5), min_size=1
    ),
    st.integers(1, 200),
)
def test_kinds_keep_their_shares_in_every_prefix(mix, rounds):
    found = list(kinds(rounds, mix))
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
