"""What llms.py reads and writes: the backends to compare, the right answers, and the table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ray_synth.config import LlmConfig, parse_config
from ray_synth.errors import UserError, shortened
from ray_synth.meaning.answers import phrase_key
from ray_synth.meaning.comparison import Outcome, Same

MOST_DIFFERENCES = 30  # classes that the Markdown lists; the JSON has all


def read_backends(values: Any, *, origin: str = "backends") -> dict[str, LlmConfig]:
    """A mapping of names to settings of `meaning.llm`, validated.

    Raises:
        UserError: it is not such a mapping, or a key or value is wrong; the message names it.
    """
    if not isinstance(values, dict) or not values:
        raise UserError(f"{origin}: give a mapping of names to settings as under meaning.llm")
    return {
        str(name): parse_config(settings, origin=f"{origin}, {name}", model=LlmConfig)
        for name, settings in values.items()
    }


def read_truth(
    values: Any, class_names: Iterable[str], *, origin: str = "truth"
) -> dict[str, list[str]]:
    """A mapping of class names to words or phrases, one of which makes a choice right.

    Raises:
        UserError: it is not such a mapping, or names an unknown class.
    """
    if not isinstance(values, dict):
        raise UserError(f"{origin}: give a mapping of class names to accepted words")
    known = set(class_names)
    truth = {}
    for name, words in values.items():
        given = words if isinstance(words, list) else [words]
        plain = [str(word) for word in given if type(word) in (str, int, float)]
        listed = [word for word in plain if any(c.isalnum() for c in word)]
        if str(name) not in known:
            raise UserError(
                f"{origin}: {str(name)!r} is none of the classes ({shortened(sorted(known), 10)})"
            )
        if not listed or len(listed) < len(given):
            raise UserError(f"{origin}: {name}: give at least one word")
        truth[str(name)] = listed
    return truth


def same_meaning(features: Mapping[str, np.ndarray], *, merge_at: float) -> Same:
    """A test of two choices: equal but for case and articles, or alike to the text encoder.

    Args:
        features: unit row of each choice.
        merge_at: cosine similarity from which two phrases are taken to mean the same.
    """

    def same(one: str, other: str) -> bool:
        return phrase_key(one) == phrase_key(other) or bool(
            features[one] @ features[other] >= merge_at
        )

    return same


def markdown(rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], *, same: Same) -> str:
    """The rows as a table, and the classes on which backends differ as another."""
    lines = [
        "| backend | model | agrees with the others | right | mean confidence | ambiguous "
        "| refused phrases | seconds | questions | prompt tokens | answer tokens |",
        "|---|---|" + "---:|" * 9,
    ]
    for row in rows:
        name = f"| {_cell(row['backend'])} | {_cell(row['model'])} "
        if "problem" in row:
            lines.append(f"{name}| failed: {_cell(row['problem'])} |" + " |" * 8)
            continue
        judged = f" of {row['judged']}" if row["judged"] else ""
        lines.append(
            f"{name}| {_percent(row['agreement'])} | {_percent(row['accuracy'])}{judged} "
            f"| {row['confidence']:.2f} | {_percent(row['ambiguous'])} | {row['refused']} "
            f"| {row['seconds']:.1f} | {row['questions']} | {row['prompt_tokens']} "
            f"| {row['answer_tokens']} |"
        )
    return "\n".join(lines + _differences(outcomes, same))


def _differences(outcomes: Sequence[Outcome], same: Same) -> list[str]:
    answered = [outcome for outcome in outcomes if not outcome.problem]
    if len(answered) < 2:
        return []
    choices = [outcome.choices() for outcome in answered]
    differing = [
        name for name in choices[0] if not all(same(choices[0][name], c[name]) for c in choices)
    ]
    if not differing:
        return ["", f"All chose the same meanings for {len(choices[0])} classes."]
    shown = differing[:MOST_DIFFERENCES]
    return [
        "",
        f"They differ on {len(differing)} of {len(choices[0])} classes"
        + (f"; the first {len(shown)}:" if len(shown) < len(differing) else ":"),
        "",
        "| class | " + " | ".join(_cell(outcome.name) for outcome in answered) + " |",
        "|---|" + "---|" * len(answered),
        *(
            f"| {_cell(name)} | " + " | ".join(_cell(c[name]) for c in choices) + " |"
            for name in shown
        ),
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}%"


def _cell(text: str) -> str:
    """Text that cannot end a table's cell or line."""
    return " ".join(re.sub(r"[\\|]", r"\\\g<0>", text).split())
