"""A prompt of no more tokens than the text encoder reads: what matters least is left out first."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from ray_synth.meaning.answers import phrase_key
from ray_synth.meaning.candidates import with_article

SUBJECT = "{subject}"
# A text's pieces: words, and single characters of scripts that set no spaces between words (Thai, Lao,
# Burmese, Khmer, Chinese, Japanese).
PIECE = re.compile(
    r"\s*(?:[^\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+|\S)"
)
LONGEST = 8_000  # characters of a name or a meaning that are looked at: no encoder reads more


@lru_cache(maxsize=65_536)
def subject(class_name: str, meaning: str) -> str:
    """How a prompt names a class: "a crane, a large wading bird".

    The paper appends the meaning to the name. Where the meaning already says the name ("the number
    seven"), the name is not said twice.
    """
    name = " ".join(class_name.replace("_", " ").split())
    meaning = " ".join(meaning.split())
    if not meaning or phrase_key(meaning) == phrase_key(name):
        return with_article(name)
    if f" {phrase_key(name)} " in f" {phrase_key(meaning)} ":
        return meaning
    return f"{with_article(name)}, {meaning}"


def fit_prompt(
    template: str,
    class_name: str,
    meaning: str,
    phrases: Sequence[str],
    *,
    count_tokens: Callable[[str], int],
    max_tokens: int,
    lost: Counter[str] | None = None,
) -> str:
    """A prompt of at most `max_tokens` tokens, start and end marks included.

    Phrases that do not fit are left out, later ones first to go; then the meaning loses its end, word
    by word, or character by character where its script has no spaces; last the name does.

    Args:
        lost: counts by what the prompt lost: "scene", "meaning" or "name"; the worst of the three.
    """
    class_name, meaning = class_name[:LONGEST], meaning[:LONGEST]
    whole = ", ".join([template.replace(SUBJECT, subject(class_name, meaning)), *phrases])
    if count_tokens(whole) <= max_tokens:  # nearly always, and counting is what takes time
        return whole
    prompt, what = _fit_subject(template, class_name, meaning, count_tokens, max_tokens)
    for phrase in phrases:
        longer = f"{prompt}, {phrase}"
        if count_tokens(longer) <= max_tokens:
            prompt = longer
    if lost is not None:
        lost[what] += 1
    return prompt


@lru_cache(maxsize=65_536)
def _fit_subject(
    template: str,
    class_name: str,
    meaning: str,
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> tuple[str, str]:
    """The template with as much of its subject as fits, and what was lost: scene, meaning or name."""

    def filled(name: str, meaning: str) -> str:
        return template.replace(SUBJECT, subject(name, meaning))

    def fits(text: str) -> bool:
        return count_tokens(text) <= max_tokens

    if fits(filled(class_name, meaning)):
        return filled(class_name, meaning), "scene"
    name = " ".join(class_name.replace("_", " ").split())
    if fits(filled(name, "")):
        cut = longest(meaning, lambda part: fits(filled(name, part)))
        return filled(name, cut), "meaning"
    return filled(longest(name, lambda part: fits(filled(part, ""))), ""), "name"


def longest(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of a text that fits, in whole words; of its first word, where that alone
    does not, as many characters as fit."""
    ends = [found.end() for found in PIECE.finditer(text)]
    found = _beginning(text, ends, fits)
    return found or _beginning(text, range(1, (ends or [0])[0] + 1), fits)


def _beginning(text: str, ends: Sequence[int], fits: Callable[[str], bool]) -> str:
    """The text up to the last of these ends that fits: halved down to, then stepped back."""
    low, high = 0, len(ends)  # the first `low` ends fit, as far as was seen
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(_clean(text, ends[middle - 1])) else (low, middle - 1)
    for at in range(low, 0, -1):  # tokens do not grow with each character
        if fits(part := _clean(text, ends[at - 1])):
            return part
    return ""


def _clean(text: str, end: int) -> str:
    """The text up to an end, which does not part a character from its marks."""
    while end < len(text) and end > 0 and _joins(text[end]):
        end -= 1
    return text[:end].rstrip(" ,;:-(\u200c\u200d\u3001")


def _joins(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf", "Sk")
