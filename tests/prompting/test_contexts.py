"""Contexts come from the LLM where it writes good ones, else from the pool; prompts fit."""

import asyncio
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_synth.meaning.answers import FAR_WORDS, FIELDS, clean_phrase
from ray_synth.meaning.few_shot import FewShot
from ray_synth.prompting.contexts import (
    LABELS,
    Context,
    combine,
    context_key,
    context_question,
    contextual_prompt,
    load_pool,
    plain_prompt,
    write_contexts,
)
from ray_synth.prompting.fitting import subject

GOOD = {
    "Foreground": ["beside a cup; next to a lamp; behind a vase", "among flowers; under a tree"],
    "Background": ["on a table; in a garden; on a wall", "in a shop; on a road"],
    "Lighting": ["at dusk; by candlelight", "in bright light; at night"],
    "Camera angle": ["close-up; tilted", "from above; front view"],
}


def answering(answers: dict[str, list[str]]):
    asked: list[tuple[FewShot, int]] = []

    async def complete(prompt: FewShot, seed: int, **options: object) -> str:
        asked.append((prompt, seed))
        choices = answers[prompt.labels[1]]
        return choices[len(asked) % len(choices)]

    return complete, asked


def write(answers: dict[str, list[str]], **options):
    complete, asked = answering(answers)
    options = {"num_contexts": 8, **options}
    return asyncio.run(write_contexts("crane", "a large bird", complete=complete, **options)), asked


def test_the_llm_writes_the_contexts_where_it_can() -> None:
    result, asked = write(GOOD)
    assert [source for _, source in result.contexts] == ["llm"] * 8
    assert len({context_key(context) for context, _ in result.contexts}) == 8
    assert len(result.raw) == len(asked)
    assert {prompt.labels[1] for prompt, _ in asked} == set(LABELS.values())
    assert all(context.phrases() for context, _ in result.contexts)


def test_the_pool_fills_up_what_the_llm_leaves_short() -> None:
    few = {label: [""] for label in GOOD} | {
        "Foreground": ["beside a cup"],
        "Background": ["on a wall"],
    }
    result, asked = write(few, retries=1)
    sources = [source for _, source in result.contexts]
    assert sources == ["llm"] + ["pool"] * 7
    assert len({seed for _, seed in asked}) == len(asked)
    assert result.contexts[0][0] == Context("beside a cup", "on a wall")


@given(st.text(max_size=200))
def test_no_answer_raises(text: str) -> None:
    result, _ = write({label: [text] for label in GOOD}, num_contexts=3, retries=1)
    assert len(result.contexts) == 3


def test_the_same_seed_writes_the_same_and_json_keeps_it() -> None:
    result, _ = write(GOOD, seed=5)
    assert result.as_dict() == write(GOOD, seed=5)[0].as_dict()
    assert result.as_dict() != write(GOOD, seed=6)[0].as_dict()
    entry = result.as_dict()["contexts"][0]
    assert Context(**entry["context"]) == result.contexts[0][0]


def test_a_bare_thing_becomes_part_of_the_scene() -> None:
    answers = GOOD | {"Foreground": ["a coin; a small dog"], "Background": ["a tall tower"]}
    result, _ = write(answers, num_contexts=2)
    assert result.contexts[0][0].foreground in ("with a coin", "with a small dog")
    assert result.contexts[0][0].background == "in front of a tall tower"


@given(
    st.dictionaries(st.sampled_from(FIELDS), st.lists(st.text("abc", min_size=1), unique=True)),
    st.integers(0, 20),
    st.integers(0, 9),
)
def test_combining_repeats_no_pair(phrases: dict[str, list[str]], number: int, seed: int) -> None:
    contexts = combine(phrases, number, seed=seed)
    assert len(contexts) <= number
    pairs = [(context.foreground, context.background) for context in contexts]
    assert len(set(pairs)) == len(pairs)


def test_the_pool_is_large_near_and_clean() -> None:
    pool = load_pool()
    drawn = pool.draw(400, seed=1)
    assert len({context_key(context) for context in drawn}) == 400
    assert drawn == pool.draw(400, seed=1)
    assert not any(FAR_WORDS.search(angle) for angle in pool.camera_angles)
    assert all(clean_phrase(phrase) == phrase for context in drawn for phrase in context.phrases())
    assert not {context_key(c) for c in pool.draw(5, seed=1, taken=drawn)} & {
        context_key(c) for c in drawn
    }


@pytest.mark.parametrize(
    ("name", "meaning", "phrase"),
    [
        ("crane", "a large wading bird", "a crane, a large wading bird"),
        ("drum", "a drum used in music", "a drum used in music"),
        ("owl", "owl", "an owl"),
        ("tow_truck", "", "a tow truck"),
        ("ox", "a box for tools", "an ox, a box for tools"),
    ],
)
def test_the_name_is_said_once(name: str, meaning: str, phrase: str) -> None:
    assert subject(name, meaning) == phrase


def words(text: str) -> int:
    return 2 + len(text.replace(",", " ,").split())


CONTEXT = Context("next to a cup", "on a table", "at dusk", "close-up")


def test_the_context_comes_after_the_meaning() -> None:
    prompt = contextual_prompt("crane", "a bird", CONTEXT, count_tokens=words, max_tokens=77)
    assert prompt == "a photo of a crane, a bird, next to a cup, on a table, at dusk, close-up"
    assert plain_prompt("crane", "a bird", count_tokens=words, max_tokens=77) == (
        "a photo of a crane, a bird"
    )


@given(st.integers(8, 40), st.lists(st.sampled_from(["big", "red", "old", "bird"]), max_size=30))
def test_prompts_fit_the_text_encoder_and_keep_the_name(limit: int, meaning: list[str]) -> None:
    phrase = " ".join(meaning)
    prompt = contextual_prompt("crane", phrase, CONTEXT, count_tokens=words, max_tokens=limit)
    assert words(prompt) <= limit
    assert prompt.startswith("a photo of a crane")
    plain = plain_prompt("crane", phrase, count_tokens=words, max_tokens=limit)
    assert prompt.startswith(plain)


def test_examples_show_every_field() -> None:
    for field in FIELDS:
        question = context_question("crane", "a large bird", field)
        assert question.as_text().endswith(f"Subject: a crane, a large bird\n{LABELS[field]}:")
    assert tuple(asdict(Context())) == FIELDS
