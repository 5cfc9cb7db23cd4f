"""Backends and truths are read strictly, compared by hand-computed numbers, and shown in tables."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.llms_table import MOST_DIFFERENCES, markdown, read_backends, read_truth, same_meaning
from ray_synth.config import LlmConfig
from ray_synth.meaning.answers import phrase_key
from ray_synth.meaning.comparison import Outcome, compare, names_it


def same(one: str, other: str) -> bool:
    return phrase_key(one) == phrase_key(other)


def outcome(name: str, choices: dict[str, str], **options: Any) -> Outcome:
    """A backend that chose these; each class less surely than the one before."""
    entries = [
        {
            "class_name": class_name,
            "choice": choice,
            "confidence": 1 - 0.25 * i,
            "ambiguous": i > 1,
            "num_refused": i,
        }
        for i, (class_name, choice) in enumerate(choices.items())
    ]
    return Outcome(name, f"model of {name}", entries, **options)


# They agree on: a and b 3 of 4 classes, a and c 1, b and c 2.
A = outcome("a", {"crane": "a bird", "bat": "a club", "seal": "a stamp", "mouse": "a rodent"})
B = outcome("b", {"crane": "The bird", "bat": "a club", "seal": "a stamp", "mouse": "a device"})
C = outcome("c", {"crane": "a bird", "bat": "a mammal", "seal": "a fish", "mouse": "a device"})
FAILED = Outcome("d", "model of d", problem="there is no such server")


def test_backends_are_read_as_settings_of_the_llm() -> None:
    given_ones = {"small": {"model": "embedded", "style": "chat"}, 2: {}}
    assert read_backends(given_ones) == {"small": LlmConfig(style="chat"), "2": LlmConfig()}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (None, "backends.yaml: give a mapping of names to settings as under meaning.llm"),
        ({}, "backends.yaml: give a mapping"),
        (["embedded"], "backends.yaml: give a mapping"),
        ("embedded", "backends.yaml: give a mapping"),
        ({"small": {"modle": "x"}}, r"backends.yaml, small:\s+modle: unknown key; .*'model'\?"),
        ({"small": {"zzz": 1}}, r"small:\s+zzz: unknown key; known keys: .*model, "),
        ({"a": {}, "small": {"style": "prose"}}, r"backends.yaml, small:\s+style: .*'prose'"),
        ({"small": None}, r"backends.yaml, small:\s+LlmConfig: "),
        ({"small": "embedded"}, r"small:\s+LlmConfig: .*'embedded'"),
        ({"small": {"backend": "openai"}}, "needs the model's name on the server"),
    ],
)
def test_what_is_wrong_with_a_backend_is_named(values: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_backends(values, origin="backends.yaml")


def test_a_truth_is_a_word_or_several() -> None:
    values = {"crane": "bird", "bat": ["small mammal", "club"], 7: 7, "b": [1.5]}
    assert read_truth(values, ["bat", "crane", "7", "b", "q"]) == {
        "crane": ["bird"],
        "bat": ["small mammal", "club"],
        "7": ["7"],
        "b": ["1.5"],
    }
    assert read_truth({}, ["bat"]) == {}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (None, "truth.yaml: give a mapping of class names to accepted words"),
        (["bird"], "truth.yaml: give a mapping"),
        (
            {"crane": "bird", "crain": "bird"},
            r"'crain' is none of the classes \(bat, crane\)",
        ),
        ({"crane": []}, "truth.yaml: crane: give at least one word"),
        ({"crane": None}, "crane: give at least one word"),
        ({"crane": ["bird", None]}, "crane: give at least one word"),
        ({"crane": ["bird", "--"]}, "crane: give at least one word"),
        ({"crane": ""}, "crane: give at least one word"),
        ({"crane": True}, "crane: give at least one word"),  # YAML's bare on, off, yes and no
        ({"crane": {"bird": 1}}, "crane: give at least one word"),
    ],
)
def test_what_is_wrong_with_a_truth_is_named(values: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_truth(values, ["crane", "bat"], origin="truth.yaml")


@pytest.mark.parametrize(
    ("choice", "accepted", "right"),
    [
        ("a large wading bird", ["bird"], True),
        ("a large wading bird", ["fish", "Wading Bird"], True),
        ("a large wading bird", ["the large wading bird!"], True),
        ("birds of prey", ["bird"], False),
        ("a songbird", ["bird"], False),
        ("a wading large bird", ["wading bird"], False),
        ("the number 77", ["7"], False),
        ("the number 7", ["7"], True),
        ("a bird", [], False),
        ("a bird", [""], False),
    ],
)
def test_a_word_is_named_only_as_a_whole(choice: str, accepted: list[str], right: bool) -> None:
    assert names_it(choice, accepted) is right


def test_choices_mean_the_same_by_words_or_by_the_encoder() -> None:
    features = {
        "a bird": np.array([1.0, 0.0]),
        "a wader": np.array([0.96, 0.28]),
        "A Bird!": np.array([0.0, 1.0]),
    }
    alike = same_meaning(features, merge_at=0.95)
    assert alike("a bird", "a wader") and alike("a bird", "A Bird!")
    assert not alike("a wader", "A Bird!")
    assert not same_meaning(features, merge_at=0.97)("a bird", "a wader")


def test_agreement_is_the_mean_over_the_others_that_answered() -> None:
    rows = {row["backend"]: row for row in compare([A, B, FAILED, C], same=same)}
    assert rows["a"]["agreement"] == (0.75 + 0.25) / 2
    assert rows["b"]["agreement"] == (0.75 + 0.5) / 2
    assert rows["c"]["agreement"] == (0.25 + 0.5) / 2
    assert rows["d"] == {
        "backend": "d",
        "model": "model of d",
        "problem": "there is no such server",
    }


def test_a_backend_alone_agrees_with_nobody_and_costs_are_passed_on() -> None:
    alone = outcome("a", A.choices(), seconds=1.2345, questions=5, prompt_tokens=70)
    assert compare([alone, FAILED], same=same)[0] == {
        "backend": "a",
        "model": "model of a",
        "classes": 4,
        "agreement": None,
        "accuracy": None,
        "judged": 0,
        "confidence": (1 + 0.75 + 0.5 + 0.25) / 4,
        "ambiguous": 0.5,
        "refused": 0 + 1 + 2 + 3,
        "seconds": 1.23,
        "questions": 5,
        "prompt_tokens": 70,
        "answer_tokens": 0,
    }


def test_accuracy_is_over_the_classes_of_the_truth() -> None:
    truth = {"crane": ["bird"], "bat": ["mammal"], "mouse": ["rodent", "animal"]}
    rows = compare([A, B, C], same=same, truth=truth)
    assert [row["accuracy"] for row in rows] == [0.6667, 0.3333, 0.6667]
    assert [row["judged"] for row in rows] == [3, 3, 3]


ESCAPED = r"\\([!-/:-@\[-`{-~])"


def cells(line: str) -> list[str]:
    """A table line's cells as GitHub reads them: a backslash takes the next character with it."""
    parts = [m[1] for m in re.finditer(rf"((?:{ESCAPED}|\\|[^|\\])*+)\|", line)]
    assert parts[0] == ""
    return [re.sub(ESCAPED, r"\1", part).strip() for part in parts[1:]]


def test_the_table_says_what_was_measured_and_where_they_differ() -> None:
    outcomes = [A, B, FAILED]
    truth = {"crane": ["bird"], "mouse": ["rodent"]}
    lines = markdown(compare(outcomes, same=same, truth=truth), outcomes, same=same).splitlines()
    tables = {cells(line)[0]: cells(line)[1:] for line in lines if line.startswith("|")}
    assert tables["a"][:6] == ["model of a", "75%", "100% of 2", "0.62", "50%", "6"]
    assert tables["b"][:3] == ["model of b", "75%", "50% of 2"]
    assert tables["d"][:2] == ["model of d", "failed: there is no such server"]
    assert "They differ on 1 of 4 classes:" in lines
    assert tables["class"] == ["a", "b"]
    assert tables["mouse"] == ["a rodent", "a device"]
    assert "crane" not in tables  # "a bird" and "The bird" are the same


def test_nothing_to_compare_with_is_a_dash_and_no_second_table() -> None:
    text = markdown(compare([A, FAILED], same=same), [A, FAILED], same=same)
    assert cells(text.splitlines()[2])[2:4] == ["–", "–"]
    assert len(text.splitlines()) == 4
    failed = markdown(compare([FAILED], same=same), [FAILED], same=same)
    assert len(failed.splitlines()) == 3


def test_agreement_on_everything_is_said() -> None:
    both = [A, outcome("e", A.choices())]
    assert "All chose the same meanings for 4 classes." in markdown(
        compare(both, same=same), both, same=same
    )


def test_only_the_first_differences_are_listed() -> None:
    names = [f"class {i}" for i in range(MOST_DIFFERENCES + 3)]
    both = [outcome("a", dict.fromkeys(names, "x")), outcome("b", dict.fromkeys(names, "y"))]
    text = markdown(compare(both, same=same), both, same=same)
    assert f"They differ on {len(names)} of {len(names)} classes; the first 30:" in text
    assert "| class 29 |" in text and "| class 30 |" not in text


ANY_NAME = st.text() | st.text("|\\ \n`a", max_size=8)


@given(ANY_NAME, ANY_NAME, ANY_NAME.filter(bool))
def test_no_name_breaks_the_tables(name: str, class_name: str, problem: str) -> None:
    entry = {"confidence": 1.0, "ambiguous": False, "num_refused": 0, "class_name": class_name}
    outcomes = [
        Outcome(name, name, [{**entry, "choice": "a bird"}]),
        Outcome("|b|", "a\\|b", [{**entry, "choice": "a fish"}]),
        Outcome(name, name, problem=problem),
    ]
    text = markdown(compare(outcomes, same=same), outcomes, same=same)
    tables = text.partition("\n\n")[0], text.rpartition("\n\n")[2]
    first, second = ([cells(line) for line in table.splitlines()] for table in tables)
    shown = " ".join(name.split())
    assert [len(line) for line in first] == [11] * 5
    assert first[2][:2] == first[4][:2] == [shown, shown]
    assert first[3][:2] == ["|b|", "a\\|b"]
    assert first[4][2] == f"failed: {' '.join(problem.split())}".strip()
    assert [len(line) for line in second] == [3] * 3
    assert second[0][1:] == [shown, "|b|"]
    assert second[2] == [" ".join(class_name.split()), "a bird", "a fish"]
