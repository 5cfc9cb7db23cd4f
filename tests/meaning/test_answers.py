"""Any text a model may write is read without an error, and what comes out is fit for a prompt."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_synth.meaning.answers import (
    FIELDS,
    MAX_CHARS,
    MAX_SCENE_WORDS,
    MAX_WORDS,
    clean_phrase,
    parse_meanings,
    parse_scene_phrases,
    phrase_key,
)

BIRD, MACHINE = "a large wading bird", "a machine for lifting loads"


def is_fit(phrase: str) -> bool:
    return (
        phrase == phrase.strip()
        and phrase.isprintable()
        and 0 < len(phrase) <= MAX_CHARS
        and len(phrase.split()) <= MAX_WORDS
        and any(c.isalpha() for c in phrase)
        and not set(phrase) & set('[]{}()<>|\\`"\n\r\t')
    )


@pytest.mark.parametrize(
    "text",
    [
        f"{BIRD}; {MACHINE}",
        f"1. {BIRD}\n2. {MACHINE}",
        f"1) {BIRD}.\n2) {MACHINE}.",
        f"- {BIRD}\n* {MACHINE}\n",
        f"• {BIRD}\n• {MACHINE}",
        f"a) {BIRD}\nb) {MACHINE}",
        json.dumps([BIRD, MACHINE]),
        json.dumps({"meanings": [{"meaning": BIRD}, {"meaning": MACHINE}]}),
        f"```json\n{json.dumps([BIRD, MACHINE])}\n```",
        f"Here are the meanings:\n1. {BIRD}\n2. {MACHINE}",
        f"Sure! Here they are:\n\n1. “{BIRD}”\n2. '{MACHINE}'",
        f"crane: {BIRD}; crane – {MACHINE}",
        f"A crane is {BIRD}; a crane is {MACHINE}",
        f"<think>a bird? [1]</think>{BIRD}; {MACHINE}",
        f"{BIRD} (Gruidae); {MACHINE}; a tall bird that",
        f"{BIRD}; The {BIRD[2:]}!; {MACHINE}",
        f"{BIRD.upper().capitalize()}; {MACHINE}".replace("A LARGE", "A large").replace(
            "A lar", "a lar"
        ),
        f"{BIRD}\u200b; {MACHINE}\u0000",
    ],
)
def test_every_usual_form_of_answer_is_read(text: str) -> None:
    assert parse_meanings(text, "crane")[0] == [BIRD, MACHINE]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n\n",
        "crane",
        "a crane; The Crane.",
        "a bird that can",
        "very " * 30 + "tall bird",
        "the the the the",
        "a bird of a bird of a bird",
        "<lora:crane:1.5>",
        "the word for a bird",
        "a term used in building",
        "Here is the answer:",
        "As an AI I do not know",
        "{'a': ",
        "[[[[[[",
        "12 34; ;;",
    ],
)
def test_what_is_no_meaning_is_left_out(text: str) -> None:
    assert parse_meanings(text, "crane")[0] == []


def test_refused_pieces_are_counted() -> None:
    assert parse_meanings(f"crane; {BIRD}; a thing that", "crane") == ([BIRD], 2)


def test_a_phrase_loses_clauses_before_it_is_given_up() -> None:
    assert clean_phrase("the letter Q, a letter of the letters that are letters") == "the letter Q"
    assert clean_phrase("the height, 18, 20") == "the height"


@given(st.text(), st.text(max_size=30))
def test_any_text_gives_only_phrases_fit_for_a_prompt(text: str, name: str) -> None:
    phrases, refused = parse_meanings(text, name)
    assert all(is_fit(phrase) for phrase in phrases)
    assert len({phrase_key(phrase) for phrase in phrases}) == len(phrases)
    assert refused >= 0


@given(
    st.lists(
        st.sampled_from(
            ["a bird", "1. ", "; ", "\n", "[", "]", '"', "{", "}", "```", "the ", ":", "x"]
        )
        | st.characters()
    ).map("".join),
    st.sampled_from(FIELDS),
)
def test_any_text_gives_only_short_scene_phrases(text: str, field: str) -> None:
    phrases, _ = parse_scene_phrases(text, field, "a crane, a bird")
    assert all(is_fit(p) and len(p.split()) <= MAX_SCENE_WORDS + 3 for p in phrases)


@given(st.text())
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    once = clean_phrase(text)
    assert clean_phrase(once) == once


@pytest.mark.parametrize(
    ("field", "text", "kept"),
    [
        ("lighting", "at dusk; on a table; by candlelight", ["at dusk", "by candlelight"]),
        ("camera_angle", "close-up; with a friend; seen from afar; Camera angle: tilted", None),
        ("background", "Background: on a wall; behind a crane", ["on a wall"]),
        ("foreground", '["beside a cup", "on a chair"]', ["beside a cup", "on a chair"]),
    ],
)
def test_scene_phrases_keep_to_their_field(field: str, text: str, kept: list[str] | None) -> None:
    phrases, _ = parse_scene_phrases(text, field, "a crane, a large bird")
    assert phrases == (kept or ["close-up", "tilted"])
