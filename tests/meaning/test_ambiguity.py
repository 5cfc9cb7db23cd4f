"""Meanings are ranked by the images, asked for again when they fail, and never raise."""

import asyncio
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_synth.meaning.ambiguity import Models, resolve_meaning
from ray_synth.meaning.candidates import (
    KINDS,
    TEMPLATES,
    Candidate,
    meaning_question,
    with_article,
    with_cue,
)
from ray_synth.meaning.few_shot import FewShot
from ray_synth.meaning.ranking import rank_meanings

DIM = 8


def direction(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


async def embed(texts: list[str]) -> np.ndarray:
    """Texts with the word "bird" point to the images."""
    return np.stack([np.eye(DIM)[0] if "bird" in text else direction(text) for text in texts])


IMAGES = np.tile(np.eye(DIM, dtype=np.float32)[0], (4, 1))


def answering(*answers: str):
    """An LLM that gives these answers in turn, forever, and notes what it was asked."""
    asked: list[tuple[FewShot, int]] = []

    async def complete(prompt: FewShot, seed: int, **options: object) -> str:
        asked.append((prompt, seed))
        return answers[(len(asked) - 1) % len(answers)]

    return complete, asked


def resolve(complete, **options) -> dict:
    options = {"num_meanings": 2, "retries": 2, "image_features": IMAGES, **options}
    models = Models(complete, embed, options.pop("likelihood", None), options.pop("senses", None))
    return asyncio.run(resolve_meaning("crane", models=models, **options))


def test_the_meaning_that_the_images_show_is_chosen() -> None:
    complete, asked = answering("large wading bird", "machine for lifting", "port in the north")
    entry = resolve(complete)
    assert entry["choice"] == "a large wading bird"
    assert entry["candidates"][0]["source"] == "llm"
    assert {c["meaning"] for c in entry["candidates"]} >= {"crane", "a machine for lifting"}
    assert entry["num_images"] == 4
    assert len(entry["raw_answers"]) == len(asked) == 6
    assert len({seed for _, seed in asked}) == len(asked)


def test_too_few_meanings_are_asked_for_again_with_new_seeds() -> None:
    complete, asked = answering("crane", "", "a thing that")
    entry = resolve(complete)
    assert entry["choice"] == "crane"
    assert entry["margin"] is None
    assert entry["num_refused"] > 0
    assert len(asked) == 3 * 6
    assert len({seed for _, seed in asked}) == len(asked)


@given(st.lists(st.text(), min_size=1, max_size=6))
def test_no_answer_raises(answers: list[str]) -> None:
    complete, _ = answering(*answers)
    entry = resolve(complete, retries=0)
    assert entry["choice"] == entry["candidates"][0]["meaning"]
    assert [c["source"] for c in entry["candidates"]].count("name") == 1


def test_a_users_meaning_is_ranked_beside_the_llms() -> None:
    complete, _ = answering("machine for lifting")
    entry = resolve(complete, meanings=["The tall bird"])
    assert entry["choice"] == "the tall bird"
    assert entry["candidates"][0]["source"] == "user"


@pytest.mark.parametrize(
    "options", [{"meanings": ["<lora:x>"]}, {"image_features": IMAGES[:0]}, {"num_meanings": 0}]
)
def test_what_the_caller_got_wrong_is_said(options: dict) -> None:
    with pytest.raises(ValueError, match=r"meaning|images"):
        resolve(answering("a bird")[0], **options)


def test_the_same_seed_asks_the_same() -> None:
    first, second, other = answering("a bird"), answering("a bird"), answering("a bird")
    resolve(first[0], seed=3)
    resolve(second[0], seed=3)
    resolve(other[0], seed=4)
    assert first[1] == second[1]
    assert first[1] != other[1]


def rank(scores: list[float], **options) -> dict:
    texts = np.zeros((len(scores), len(TEMPLATES), 2))
    for i, score in enumerate(scores):
        texts[i] = [score, np.sqrt(1 - score**2)]
    candidates = options.pop("candidates", [Candidate(f"m{i}", "llm") for i in range(len(scores))])
    return rank_meanings(candidates, np.array([[1.0, 0.0]]), texts, **options)


@given(st.lists(st.floats(-0.9, 0.9), min_size=1, max_size=8))
def test_ranking_is_by_mean_similarity(scores: list[float]) -> None:
    ranking = rank(scores)
    found = [candidate["similarity"] for candidate in ranking["candidates"]]
    assert found == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    best = [candidate["score"] for candidate in ranking["candidates"]]
    if len(scores) > 1 and min(scores) > 0:
        assert ranking["margin"] == pytest.approx(best[0] - best[1], abs=1e-5)


def test_near_ties_go_to_what_the_llm_says_again_and_far_ones_do_not() -> None:
    often, once = Candidate("often", "llm", 3), Candidate("once", "llm", 1)
    assert rank([0.300, 0.305], candidates=[often, once])["choice"] == "often"
    assert rank([0.300, 0.400], candidates=[often, once])["choice"] == "once"
    assert rank([0.300, 0.305], candidates=[often, once], agreement=0.0)["choice"] == "once"


def test_questions_go_round_the_kinds_of_sense_and_hold_no_answer() -> None:
    kinds = [meaning_question("guitar_pick", turn=turn) for turn in range(len(KINDS))]
    assert len({question.question for question in kinds}) == len(KINDS)
    assert all("guitar pick" in question.as_text() for question in kinds)
    assert kinds[0].as_text().endswith("Meaning: a")


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        ("bird", "the bird"),
        ("a bird", "a bird"),
        ("1. a bird", "1. a bird"),
        ("", ""),
        ("- x", "- x"),
    ],
)
def test_the_cue_is_put_back_where_the_model_went_on_from_it(answer: str, whole: str) -> None:
    assert with_cue("the", answer) == whole


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("crane", "a crane"), ("owl", "an owl"), ("the sea", "the sea"), ("Airedale", "Airedale")],
)
def test_articles(name: str, phrase: str) -> None:
    assert with_article(name) == phrase


async def likelihood(prompts: list, answers: list[str]) -> list[float]:
    """The context is likely after a machine, and a machine after the context."""
    said = zip(prompts, answers, strict=True)
    return [
        -5.0 if "machine" in f"{prompt if isinstance(prompt, str) else answer}" else -25.0
        for prompt, answer in said
    ]


def test_a_context_decides_where_there_are_no_images() -> None:
    complete, asked = answering("a large wading bird", "a machine for lifting")
    context = "from a list of construction machines"
    entry = resolve(complete, image_features=None, context=context, likelihood=likelihood)
    assert entry["choice"] == "a machine for lifting"
    assert entry["num_images"] == 0 and entry["context"] == context
    assert entry["confidence"] > 0.9 and not entry["ambiguous"]
    assert any(context in question.question for question, _ in asked)


def test_images_and_context_are_weighed_together() -> None:
    complete, _ = answering("a large wading bird", "a machine for lifting")
    context = "from a list of construction machines"
    both = {"context": context, "likelihood": likelihood}
    assert resolve(complete, **both)["choice"] == "a large wading bird"  # the images are sure
    unsure = resolve(complete, **both, temperature=100.0)
    assert unsure["choice"] == "a machine for lifting"


def test_a_context_without_likelihoods_falls_back_on_the_text_encoder() -> None:
    complete, _ = answering("a large wading bird", "a machine for lifting")
    entry = resolve(complete, image_features=None, context="from a list of bird names")
    assert entry["choice"] == "a large wading bird"


def test_the_callers_and_the_lexicons_candidates_need_no_llm() -> None:
    complete, asked = answering("unasked")
    entry = resolve(
        complete,
        num_meanings=0,
        meanings=["a machine for lifting"],
        senses=lambda name: [Candidate(f"a bird called {name}", "lexicon")],
    )
    assert not asked
    assert entry["choice"] == "a bird called crane"
    assert {c["source"] for c in entry["candidates"]} == {"user", "lexicon", "name"}
    with pytest.raises(ValueError, match="no meaning of 'crane' to rank"):
        resolve(complete, num_meanings=0)


def test_neither_images_nor_context_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        resolve(answering("a bird")[0], image_features=None)
