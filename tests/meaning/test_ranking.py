"""Order, probabilities, ambiguity and merging are functions of features alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_synth.meaning.background import Background
from ray_synth.meaning.candidates import Candidate, merge_alike, siblings_context
from ray_synth.meaning.ranking import ALIKE, NO_THING, rank_meanings


def texts(*cosines: float) -> np.ndarray:
    """Text features at these cosines to the first axis, (n, 1, 3)."""
    return np.array([[[c, (1 - c * c) ** 0.5, 0.0]] for c in cosines])


def images(*cosines: float) -> np.ndarray:
    return np.array([[c, (1 - c * c) ** 0.5, 0.0] for c in cosines])


SENSES = [Candidate("a bird", "llm", 1), Candidate("a machine", "llm", 1)]


def spread(deviation: float) -> Background:
    """A background in which every text has mean 0 and this spread."""
    return Background.of(np.concatenate([np.eye(3), -np.eye(3)]) * deviation * 3**0.5)


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_probabilities_add_up_and_follow_deviations_and_temperature(number, temperature):
    near = spread(0.1)
    ranked = rank_meanings(
        SENSES, images(*[1] * number), texts(0.3, 0.1), background=near, temperature=temperature
    )
    first, second = ranked["candidates"]
    assert (first["deviations"], second["deviations"]) == pytest.approx((3, 1), rel=1e-5)
    weight = (ALIKE + (1 - ALIKE) / number) ** -0.5  # a mean of many varies less than one
    evidence = np.log1p(np.exp(np.array([3, 1]) * weight / temperature))
    assert first["score"] - second["score"] == pytest.approx(-np.diff(evidence)[0], abs=1e-5)
    assert first["probability"] + second["probability"] == pytest.approx(1, abs=1e-5)
    odds = np.exp(evidence[0] - evidence[1])
    assert ranked["confidence"] == pytest.approx(odds / (1 + odds), abs=1e-5)


def test_what_is_near_every_image_wins_nothing_by_it():
    """Cosine similarity alone takes the phrase that all images are near; standing out does not."""
    phrases, seen = np.array([[[0.8, 0.6, 0.0]], [[0.7, 0.0, 0.714]]]), images(0.9)
    candidates = [Candidate("anything", "user"), Candidate("a bird", "user")]
    others = Background.of(np.array([[0.8, 0.6, 0.0], [0.82, 0.57, 0.0], [0.79, 0.61, 0.0]]))
    assert rank_meanings(candidates, seen, phrases)["choice"] == "anything"
    assert rank_meanings(candidates, seen, phrases, background=others)["choice"] == "a bird"


def test_images_like_any_others_leave_it_a_guess():
    three = [Candidate(f"sense {i}", "user") for i in range(3)]
    ranked = rank_meanings(three, images(0.2), texts(0.9, 0.1, -0.2), background=spread(2.0))
    assert ranked["ambiguous"] and ranked["confidence"] == pytest.approx(1 / 3, abs=0.05)
    unlike = rank_meanings(three, images(1), texts(-0.5, -0.6, -0.7), background=spread(0.1))
    assert unlike["confidence"] == pytest.approx(1 / 3, abs=0.01)  # and not sure of the least bad


def test_images_are_of_things_unless_they_say_otherwise():
    senses = [Candidate("a poor loser", "lexicon", thing=False), Candidate("a tool", "lexicon")]

    def ask(*cosines):
        return rank_meanings(senses, images(1), texts(*cosines), background=spread(0.1))

    assert ask(0.1, 0.1)["choice"] == "a tool"
    assert ask(0.5, 0.1)["choice"] == "a poor loser"
    lead = ask(0.1, 0.1)["candidates"]
    assert lead[0]["score"] - lead[1]["score"] == pytest.approx(NO_THING, abs=1e-5)


def test_the_bare_name_is_chosen_only_where_nothing_else_is_near():
    candidates = [*SENSES, Candidate("crane", "name")]

    def ask(*cosines):
        return rank_meanings(candidates, images(1), texts(*cosines), background=spread(0.1))

    ranked = ask(0.4, 0.1, 0.9)
    assert ranked["choice"] == "a bird" and ranked["confidence"] > 0.9
    assert ranked["candidates"][-1]["source"] == "name"
    assert ranked["candidates"][-1]["probability"] == 0
    assert ask(-0.1, -0.2, 0.5)["choice"] == "crane"
    assert rank_meanings(candidates[2:], images(1), texts(0.1))["confidence"] == 1


def test_an_answer_of_the_llms_that_the_images_do_not_support_is_no_rival():
    candidates = [Candidate("the number 7", "llm", 9), Candidate("a chess board", "user")]
    ranked = rank_meanings(candidates, images(1), texts(-0.01, 0.02), background=spread(0.1))
    assert ranked["choice"] == "a chess board" and ranked["confidence"] == 1
    assert ranked["candidates"][1]["probability"] == 0  # kept, to be seen


def test_it_says_when_it_cannot_tell():
    sure = rank_meanings(SENSES, images(1, 0.99), texts(0.9, 0.2), temperature=0.01)
    assert not sure["ambiguous"]
    low = rank_meanings([*SENSES, Candidate("a port", "llm", 1)], images(1), texts(0.9, 0.899, 0.9))
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
    odds = [c["probability"] for c in ranked["candidates"]]
    assert odds == sorted(odds, reverse=True)
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
