"""Class names on their way into a question to a language model: one plain line, whatever the data say.

A question is lines of "Word: ..." and "Meaning: ...", or a chat of turns: a name must not be able to add
a line, a label or a turn. A caller's is refused (`one_plain_line`), one of a data set, which nobody typed
here, is cleaned (`plain_name`).
"""

from __future__ import annotations

import re
import unicodedata

from ray_synth.errors import UserError

FORMAT_MARKS = re.compile(
    r"<\|[^|]*\|?>|\[/?INST\]|</?s>|<(start|end)_of_turn>|"
    r"\b(word|meaning|question|answer|scene)s?\s*[:：]",
    re.IGNORECASE,
)
# Format characters that words are spelt with: joiners (Persian, Hindi, Sinhala), direction marks.
SPELT_WITH = frozenset("\u200c\u200d\u200e\u200f\u061c")
MOST_CHARACTERS = 200


def breaks_a_line(character: str) -> bool:
    """Whether a character is a control, a line's end, or one that is not seen and spells nothing."""
    return character not in SPELT_WITH and unicodedata.category(character) in (
        "Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp",
    )  # fmt: skip


def one_plain_line(text: str) -> str:
    """`text`, where it can stand in a question without changing the question's format.

    Raises:
        UserError: it holds a line break, a control character, or a mark of a prompt's format.
    """
    if any(breaks_a_line(c) for c in text):
        raise UserError("give one line without control characters")
    mark = FORMAT_MARKS.search(text)
    if mark:
        raise UserError(f"{mark.group(0)!r} is a mark of the question's own format: leave it out")
    if not any(c.isalnum() for c in text):
        raise UserError("give at least one letter or digit")
    return text


def plain_name(name: str) -> str:
    """A class name of a data set as a question has it: spaces for "_" and for what breaks a line, no
    marks of a format, and no longer than `MOST_CHARACTERS`. An ordinary name is as it was, and one
    of which nothing is left is "unnamed"."""
    text = name[: 8 * MOST_CHARACTERS].replace("_", " ")
    if any(breaks_a_line(c) for c in text):
        text = " ".join("".join(" " if breaks_a_line(c) else c for c in text).split())
    while FORMAT_MARKS.search(text):  # again: what is left may join to another
        text = FORMAT_MARKS.sub(" ", text)
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS].rsplit(" ", 1)[0]
    return text if text.strip() else "unnamed"


__all__ = ["MOST_CHARACTERS", "one_plain_line", "plain_name"]
