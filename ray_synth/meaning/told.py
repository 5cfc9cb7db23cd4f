"""What a user knows of a class's name, as options of `resolve_meaning`: candidates, names, a context."""

from __future__ import annotations

from typing import Any

from ray_synth.config import ClassInfo
from ray_synth.errors import UserError
from ray_synth.meaning.answers import clean_phrase
from ray_synth.meaning.candidates import with_article
from ray_synth.meaning.names import one_plain_line


def as_told(info: ClassInfo | None, context: str | None) -> dict[str, Any]:
    """`meanings`, `synonyms` and `context` of a class.

    A synonym is a candidate, and a lexicon is asked for its senses too. What the class is a kind of is a
    candidate, "a kind of bird", and the context by which all others are judged.

    Args:
        context: what all classes are of.

    Raises:
        UserError: a phrase cannot go in a prompt.
    """
    if info is None:
        return {"context": context}
    meanings = [with_article(_line(name)) for name in info.synonyms]
    if info.parent:
        kind = f"a kind of {_line(info.parent)}"
        meanings.append(kind)
        context = f"{context}, {kind}" if context else kind
    for phrase in meanings:
        if clean_phrase(phrase) != phrase:
            raise UserError(
                f"{phrase!r} cannot go in a prompt as it is: give a few plain words, without commas, "
                "quotes or parentheses"
            )
    return {"meanings": meanings, "synonyms": list(info.synonyms), "context": context}


def _line(text: str) -> str:
    return " ".join(one_plain_line(text).replace("_", " ").split())
