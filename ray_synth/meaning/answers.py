"""What a language model said, made safe to use: raw text in, validated short phrases out.

Any text is accepted and nothing raises: what cannot be read as a phrase is left out.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ray_synth.meaning.names import SPELT_WITH

KEPT = SPELT_WITH | {"\n", "\t"}
MAX_WORDS = 12
MAX_CHARS = 80
MAX_SCENE_WORDS = 8
MAX_ANSWER_CHARS = 20_000  # what is read of one answer

ARTICLES = ("a", "an", "the")
# a phrase that ends in one of these was cut off by the token limit
DANGLING_WORDS = """
    a an the of to in on at by for from with without and or nor but that which who whose whom as
    is are was were be been being has have had can could may might will would should must not
    than then into onto over under between its his her their your my our this these those it
    they he she we you i very more most usually often also used called made when where while
    because if so such about like one's typically commonly especially including
"""
DANGLING = frozenset(DANGLING_WORDS.split())
# how a model talks about its answer instead of giving it
CHATTER = re.compile(
    r"^(here (are|is)|sure\b|certainly\b|of course\b|okay\b|as an ai|i am\b|i'm\b|i can|i cannot|"
    r"note\b|the (word|term|phrase) .* (means|refers|has|can)|answer\b|question\b|example|"
    r"meanings?\b|senses?\b|words?\s*:|scenes?\s*:|please\b|ignore\b|assistant\b|user\b|system\b|"
    r"http)",
    re.IGNORECASE,
)
# about the word and not about the thing: no picture shows it
METALINGUAL = re.compile(
    r"^((an?|the)\s+)?((plural|singular|latin|greek|english|french|german|common|another)\s+)?"
    r"(words?|terms?|phrase|name|noun|verb|adjective|reference|synonym|abbreviation|prefix|suffix|"
    r"syllables?)\b",
    re.IGNORECASE,
)
BULLET = re.compile(r"^\s*(?:[-*+•·–—>#]+\s+|\(?\d{1,2}[.):]\s*(?!\d)|\(?[a-z][.)]\s+)")
PARENTHESES = re.compile(r"\([^()]*\)?|\[[^\[\]]*\]?|\{[^{}]*\}?")
QUOTES = re.compile(r"[\"“”„«»]|(?<!\w)['‘’]|['‘’](?!\w)")
SENTENCE_END = re.compile(r"(?<=[^\W\d_]{2})[.!?](?:\s|$).*|[.!?]+\s*$", re.DOTALL)
FORBIDDEN = re.compile(r"[\[\]{}()<>|\\`~^=@_*#\"“”]|://|:(?:\s|$)")
# How models mark what they think before they answer (DeepSeek and Qwen, Mistral, Seed, Gemini).
THOUGHT_BEGINS = re.compile(r"[<\[](?:seed:)?(?:think|thinking|thought)[>\]]", re.IGNORECASE)
THOUGHT_ENDS = re.compile(r"[<\[]/(?:seed:)?(?:think|thinking|thought)[>\]]", re.IGNORECASE)

FIELDS = ("foreground", "background", "lighting", "camera_angle")
# What a phrase must speak of to pass for a light or a camera angle: small models wander off.
LIGHT_WORDS = re.compile(
    r"light|lit\b|dark|dim|bright|sun|moon|star|shad|night|dusk|dawn|noon|morning|evening|twilight|"
    r"glow|golden|candle|lamp|lantern|neon|overcast|cloud|fog|mist|flash|fire|blue hour|storm|gloom",
    re.IGNORECASE,
)
CAMERA_WORDS = re.compile(
    r"close|shot|angle|view|above|below|overhead|front|side|profile|tilt|level|fram|macro|"
    r"perspective|zoom|behind|low|high|portrait",
    re.IGNORECASE,
)
# The class must stay the largest thing in the picture. Measured with the embedded models: 93% of
# digits are recognised in a "close-up", 48% in a "wide shot", 38% "seen from afar".
FAR_WORDS = re.compile(r"\bfar\b|afar|wide|distan|away|full|panoram|aerial|horizon", re.IGNORECASE)
MUST_MATCH = {"lighting": LIGHT_WORDS, "camera_angle": CAMERA_WORDS}


def parse_meanings(text: str, class_name: str) -> tuple[list[str], int]:
    """Meaning phrases in an answer about `class_name`, and how many pieces were refused.

    Understands numbered lists, bullets, semicolons, JSON and code fences. Left out: phrases that
    are empty, too long, cut off, repeat themselves, say only the name, or carry markup.
    """
    kept: dict[str, str] = {}
    refused = 0
    for item in _items(text):
        phrase = clean_phrase(_without_echo(item, class_name))
        key = phrase_key(phrase)
        if not phrase or key == phrase_key(class_name):
            refused += 1
        else:
            kept.setdefault(key, phrase)
    return list(kept.values()), refused


def parse_scene_phrases(text: str, field: str, subject: str) -> tuple[list[str], int]:
    """Phrases for one field of a scene in an answer, and how many pieces were refused.

    Reads what `parse_meanings` reads. Left out besides: what names the subject again, and a light
    or a camera angle that speaks of neither.
    """
    kept: dict[str, str] = {}
    refused = 0
    subject_words = set(phrase_key(subject).split()) - DANGLING
    label = re.compile(rf"^\W*{field.partition('_')[0]}[\w ]*:", re.IGNORECASE)
    wanted = MUST_MATCH.get(field, re.compile(""))
    for item in _items(text):
        phrase = clean_phrase(label.sub("", item))
        words = phrase_key(phrase).split()
        fits = phrase and len(words) <= MAX_SCENE_WORDS and wanted.search(phrase)
        too_far = field == "camera_angle" and FAR_WORDS.search(phrase)
        if not fits or too_far or subject_words & set(words):
            refused += 1
        else:
            kept.setdefault(" ".join(words), phrase)
    return list(kept.values()), refused


def without_thinking(text: str) -> str:
    """What follows a model's thinking; nothing, where it had not come to an end.

    A template may have begun the thought, so that its end alone is in the text.
    """
    *thoughts, answer = THOUGHT_ENDS.split(text)
    answer = THOUGHT_BEGINS.split(answer, maxsplit=1)[0]
    return answer.lstrip() if thoughts else answer


def clean_phrase(text: str) -> str:
    """A phrase fit for a prompt, or "" where none is left.

    One line, no markup, at most `MAX_WORDS` words and `MAX_CHARS` characters; a phrase that is too
    long or repeats itself loses clauses from its end before it is given up.
    """
    text = QUOTES.sub("", PARENTHESES.sub(" ", _plain(text)))
    text = SENTENCE_END.sub("", " ".join(text.split()))
    clauses = [clause.strip(" '\"‘’“”.,:;!?-–—*_`") for clause in text.split(",")]
    clauses = [clause for clause in clauses if any(c.isalpha() for c in clause)]
    while clauses:
        phrase = ", ".join(clauses)
        if _is_fit(phrase):
            return phrase[0].lower() + phrase[1:] if _starts_a_sentence(phrase) else phrase
        clauses.pop()
    return ""


def phrase_key(text: str) -> str:
    """What makes two phrases the same: case, punctuation and articles do not count."""
    words = re.sub(r"[\W_]+", " ", _plain(text).casefold()).split()
    return " ".join(word for word in words if word not in ARTICLES) or _plain(text).strip()


def _plain(text: str) -> str:
    """Compatibility-normalised, with every control character a space; newlines and what words are
    spelt with are kept."""
    text = unicodedata.normalize("NFKC", text[:MAX_ANSWER_CHARS])
    return "".join(
        c if c in KEPT or not unicodedata.category(c).startswith("C") else " " for c in text
    )


def _body(text: str) -> str:
    """The answer without a reasoning block and without the fences of code blocks."""
    return re.sub(r"^\s*```\w*\s*$", "", without_thinking(_plain(text)), flags=re.MULTILINE)


def _json(text: str) -> Any:
    """The first JSON array or object in the text, else None."""
    decoder = json.JSONDecoder()
    for match in list(re.finditer(r"[\[{]", text))[:20]:
        try:
            return decoder.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue
    return None


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield BULLET.sub("", line, count=1).strip()


def _items(text: str) -> Iterator[str]:
    """The pieces of an answer that may each be a phrase."""
    text = _body(text)
    found = _json(text)
    if found is not None:
        yield from _strings(found)
        return
    for line in _lines(text):
        if line.endswith(":"):
            continue
        yield from (piece for piece in line.split(";") if piece.strip())


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and depth < 4:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner, depth + 1)


def _without_echo(item: str, class_name: str) -> str:
    """The item without the name said first, as in "crane: a bird" or "a crane is a bird"."""
    name = re.escape(class_name.replace("_", " ").strip())
    if not name:
        return item
    echo = rf"^\W*(?:(?:an?|the)\s+)?[\"'*]*{name}[\"'*]*\s*(?:[,:;–—-]\s*|\b(?:is|means|are)\b\s*)"
    return re.sub(echo, "", item.strip(), count=1, flags=re.IGNORECASE)


def _is_fit(phrase: str) -> bool:
    words = phrase.split()
    if not 1 <= len(words) <= MAX_WORDS or len(phrase) > MAX_CHARS or "\n" in phrase:
        return False
    if FORBIDDEN.search(phrase) or CHATTER.match(phrase) or METALINGUAL.match(phrase):
        return False
    if not all(c.isprintable() or c in SPELT_WITH for c in phrase):
        return False
    if words[-1].casefold() in DANGLING or (len(words) == 1 and words[0].casefold() in ARTICLES):
        return False
    return not _loops(words)


def _loops(words: list[str]) -> bool:
    """Whether a word of content comes twice, or a pair of words does."""
    plain = [word.casefold().strip(".,'") for word in words]
    content = Counter(word for word in plain if word not in DANGLING)
    pairs = Counter(itertools.pairwise(plain))
    return any(n > 1 for n in content.values()) or any(n > 1 for n in pairs.values())


def _starts_a_sentence(phrase: str) -> bool:
    """Whether its capital is only a sentence's ("The number", but not "Roman" or "II")."""
    first = phrase.split(maxsplit=1)[0].casefold()
    return first in ARTICLES or first in DANGLING
