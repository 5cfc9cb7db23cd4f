"""Probabilities, ambiguity and merging are functions of features alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_synth.meaning.candidates import Candidate, merge_alike, siblings_context
from ray_synth.meaning.ranking import rank_meanings


def texts(*cosines: float) -> np.ndarray:
    """Text features at these cosines to the first axis, (n, 1, 3)."""
    return np.array([[[c, (1 - c * c) ** 0.5, 0.0]] for c in cosines])


def images(*cosines: float) -> np.ndarray:
    return np.array([[c, (1 - c * c) ** 0.5, 0.0] for c in cosines])


SENSES = [Candidate("a bird", "llm", 1), Candidate("a machine", "llm", 1)]


def test_probabilities_add_up_and_follow_the_temperature():
    for temperature in (0.01, 0.1, 1.0):
        ranked = rank_meanings(SENSES, images(1, 1), texts(0.9, 0.8), temperature=temperature)
        odds = [c["probability"] for c in ranked["candidates"]]
        assert sum(odds) == pytest.approx(1, abs=1e-5)
        assert odds[0] / odds[1] == pytest.approx(np.exp(0.1 / temperature), rel=1e-2)
        assert ranked["confidence"] == pytest.approx(odds[0], abs=1e-5)


def test_the_bare_name_is_no_rival_of_a_sense():
    candidates = [*SENSES, Candidate("crane", "name")]
    ranked = rank_meanings(candidates, images(1, 1), texts(0.9, 0.5, 0.895), temperature=0.01)
    assert ranked["candidates"][1]["source"] == "name"
    assert ranked["confidence"] > 0.99 and not ranked["ambiguous"]


def test_it_says_when_it_cannot_tell():
    sure = rank_meanings(SENSES, images(1, 0.99), texts(0.9, 0.2), temperature=0.01)
    assert not sure["ambiguous"]
    low = rank_meanings(
        [*SENSES, Candidate("a port", "llm", 1)], images(1), texts(0.9, 0.899, 0.9), temperature=1.0
    )
    assert low["ambiguous"] and low["confidence"] < 0.5
    # the images do not agree on which of the two it is
    torn = rank_meanings(SENSES, images(1, 1, -0.9), texts(0.9, 0.1), temperature=0.001)
    assert torn["ambiguous"] and torn["confidence"] > 0.5


@given(
    st.lists(st.floats(-0.99, 0.99), min_size=1, max_size=6),
    st.lists(st.floats(-0.99, 0.99), min_size=0, max_size=5),
    st.floats(0.001, 1),
)
def test_any_features_give_an_order_and_probabilities(phrases, pictures, temperature):
    candidates = [Candidate(f"a phrase {i}", "llm", 1) for i in range(len(phrases))]
    seen = images(*pictures) if pictures else np.zeros((0, 3))
    ranked = rank_meanings(candidates, seen, texts(*phrases), temperature=temperature)
    scores = [c["score"] for c in ranked["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert sum(c["probability"] for c in ranked["candidates"]) == pytest.approx(1, abs=1e-4)
    assert 0 < ranked["confidence"] <= 1


def test_phrases_that_mean_the_same_are_merged_and_their_answers_added_up():
    features = texts(1.0, 0.99, 0.1, 0.98)[:, 0]
    candidates = [
        Candidate("the number 7", "llm", 1),
        Candidate("the number seven", "llm", 3),
        Candidate("a bird", "llm", 1),
        Candidate("seven", "name"),
    ]
    left, rows = merge_alike(candidates, features, at=0.95)
    assert [c.meaning for c in left] == ["the number seven", "a bird", "seven"]
    assert left[0].answers == 4 and left[0].merged == ("the number 7",)
    assert rows.shape == (3, 3)


def test_given_candidates_are_never_merged_away():
    features = texts(1.0, 1.0, 1.0)[:, 0]
    given_ones = [Candidate("a heron", "user"), Candidate("a crane", "lexicon")]
    left, _ = merge_alike([Candidate("a stork", "llm", 9), *given_ones], features, at=0.95)
    assert [c.meaning for c in left] == ["a heron", "a crane"]
    assert sum(c.answers for c in left) == 9


def test_the_other_classes_are_a_context():
    assert siblings_context("crane", ["heron", "crane", "sea_gull"]) == (
        "from a list with heron, sea gull"
    )
    assert siblings_context("crane", ["crane"]) is None
