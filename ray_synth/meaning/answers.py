"""What a language model said, made safe to use: raw text in, validated short phrases out.

Any text is accepted and nothing raises: what cannot be read as a phrase is left out.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

MAX_WORDS = 12
MAX_CHARS = 80
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
BULLET = re.compile(r"^\s*(?:[-*+•·–—>#]+\s+|\(?\d{1,2}[.):]\s*(?!\d)|\(?[a-z][.)]\s+)")
PARENTHESES = re.compile(r"\([^()]*\)?|\[[^\[\]]*\]?|\{[^{}]*\}?")
QUOTES = re.compile(r"[\"“”„«»]|(?<!\w)['‘’]|['‘’](?!\w)")
SENTENCE_END = re.compile(r"(?<=[^\W\d_]{2})[.!?](?:\s|$).*|[.!?]+\s*$", re.DOTALL)
FORBIDDEN = re.compile(r"[\[\]{}()<>|\\`~^=@_*#\"“”]|://|:\s*$")


@dataclass(frozen=True)
class Context:
    """A scene to put a class in; any field may be empty.

    Attributes:
        foreground: an object near the subject, or what the subject is made of or doing.
        background: the place or surface behind it.
        lighting: the light.
        camera_angle: where the camera stands.
    """

    foreground: str = ""
    background: str = ""
    lighting: str = ""
    camera_angle: str = ""

    def phrases(self) -> list[str]:
        """The fields that are not empty, in order."""
        return [phrase for phrase in asdict(self).values() if phrase]


FIELDS = tuple(field.name for field in fields(Context))
# what a model may call a field; matched against the start of its label
FIELD_LABELS = {
    "foreground": ("foreground", "object", "subject", "setting", "scene", "action"),
    "background": ("background", "place", "location", "surface"),
    "lighting": ("light", "illumination"),
    "camera_angle": ("camera", "angle", "view", "shot", "perspective"),
}
LABEL = re.compile(r"^\W*([A-Za-z][A-Za-z _-]{2,24}?)\W*:\s*(.*)$", re.DOTALL)


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


def parse_contexts(text: str) -> tuple[list[Context], int]:
    """Scenes in an answer, and how many pieces were refused.

    Each line (or JSON object) is a scene: fields by label ("lighting: dusk"), or by position when
    three or four pieces are separated by semicolons or bars.
    """
    kept: dict[tuple[str, ...], Context] = {}
    refused = 0
    for fields_ in _scenes(text):
        context = Context(**{name: clean_phrase(value) for name, value in fields_.items()})
        # a lone field is more likely prose than a scene
        if len(context.phrases()) < 2:
            refused += 1
        else:
            kept.setdefault(context_key(context), context)
    return list(kept.values()), refused


def clean_phrase(text: str) -> str:
    """A phrase fit for a prompt, or "" where none is left.

    One line, no markup, at most `MAX_WORDS` words and `MAX_CHARS` characters; a phrase that is too
    long or repeats itself loses clauses from its end before it is given up.
    """
    text = QUOTES.sub("", PARENTHESES.sub(" ", _plain(text)))
    text = SENTENCE_END.sub("", " ".join(text.split()))
    clauses = [clause.strip(" '\"‘’“”.,:;!?-–—*_`") for clause in text.split(",")]
    clauses = [clause for clause in clauses if clause]
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


def context_key(context: Context) -> tuple[str, ...]:
    """What makes two contexts the same."""
    return tuple(phrase_key(getattr(context, name)) for name in FIELDS)


def _plain(text: str) -> str:
    """Compatibility-normalised, with every control character a space, newlines kept."""
    text = unicodedata.normalize("NFKC", text[:MAX_ANSWER_CHARS])
    return "".join(
        c if c in "\n\t" or not unicodedata.category(c).startswith("C") else " " for c in text
    )


def _body(text: str) -> str:
    """The answer without a reasoning block and without the fences of code blocks."""
    text = re.sub(r"<think>.*?(</think>|$)", " ", _plain(text), flags=re.DOTALL)
    return re.sub(r"^\s*```\w*\s*$", "", text, flags=re.MULTILINE)


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


def _scenes(text: str) -> Iterator[dict[str, str]]:
    """Field name to raw text, for each scene of an answer."""
    text = _body(text)
    found = _json(text)
    if found is not None:
        yield from _json_scenes(found)
        return
    labelled: dict[str, str] = {}
    for line in _lines(text):
        pieces = [piece.strip() for piece in re.split(r"[;|]", line) if piece.strip()]
        named = dict(pair for piece in pieces if (pair := _labelled(piece)))
        if len(pieces) == 1 and named:  # one field a line: a scene ends where a field comes again
            if named.keys() & labelled.keys():
                yield labelled
                labelled = {}
            labelled |= named
        elif named:
            yield named
        elif len(pieces) in (3, 4):
            yield dict(zip(FIELDS, pieces, strict=False))
        elif pieces:
            yield {}
    if labelled:
        yield labelled


def _json_scenes(value: Any, depth: int = 0) -> Iterator[dict[str, str]]:
    if isinstance(value, dict):
        pairs = {
            name: inner
            for label, inner in value.items()
            if isinstance(inner, str) and (name := _field_name(str(label)))
        }
        if pairs:
            yield pairs
            return
    if isinstance(value, dict | list) and depth < 4:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _json_scenes(inner, depth + 1)


def _labelled(piece: str) -> tuple[str, str] | None:
    match = LABEL.match(piece)
    name = _field_name(match[1]) if match else None
    return (name, match[2]) if match and name else None


def _field_name(label: str) -> str | None:
    label = label.strip().casefold()
    for name, starts in FIELD_LABELS.items():
        if label.startswith(starts):
            return name
    return None


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
    if FORBIDDEN.search(phrase) or CHATTER.match(phrase):
        return False
    if not any(c.isalpha() for c in phrase) or not phrase.isprintable():
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


def unique(phrases: Iterable[str]) -> list[str]:
    """The phrases without repeats (see `phrase_key`), first come first kept."""
    kept: dict[str, str] = {}
    for phrase in phrases:
        kept.setdefault(phrase_key(phrase), phrase)
    return list(kept.values())
