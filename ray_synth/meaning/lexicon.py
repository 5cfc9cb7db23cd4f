"""A dictionary's senses of a name as candidates: WordNet's noun files in, short phrases out.

A sense is ranked by its whole gloss and put in prompts by a phrase of it. The files are read as they are
(their format is wndb(5WN)), whoever packed them: Debian, NLTK, or WordNet's own archive.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from ray_synth.errors import UserError
from ray_synth.meaning.answers import MAX_WORDS, clean_phrase
from ray_synth.meaning.candidates import Candidate

SYSTEM_FOLDERS = ("/usr/share/wordnet", "/usr/local/share/wordnet", "/opt/homebrew/share/wordnet")
FILES = ("index.noun", "data.noun", "noun.exc")
MOST_CHARS = 500  # what is read of a gloss
LONGEST_LINE = 1 << 16  # bytes; WordNet 3.0's is under 13,000
UNREADABLE = (  # what reading files, or a zip file with any bytes in it, may raise
    OSError, EOFError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
FIX = (
    "install Debian's package wordnet-base, or ray-synth[lexicon] and then `python -m nltk.downloader "
    "wordnet`, or name a folder with WordNet's files index.noun and data.noun in meaning.lexicon"
)
# WordNet's numbers (lexnames(5WN)) of what images are taken of: animals, artifacts, bodies' parts, food,
# natural objects and plants. Others are acts, persons, states, units and so on.
THINGS = frozenset((b"05", b"06", b"08", b"13", b"17", b"20"))
# said of the word before what it means: "common name for an edible agaric"
ABOUT = re.compile(r"^(?:an?\s)?(?:common\s)?(?:names?|terms?)\s(?:for|of)\s")
# where a gloss that is too long may end, before the word
BOUNDARY = re.compile(
    r"\s(?=(?:of|in|into|on|onto|at|with|for|from|by|through|that|which|who|whose|when|where|having|"
    r"used|made|consisting|containing|resembling|and|or|as|to|especially)\s)"
)
# a cut that leaves a clause without its end: "clay baked", "an element that when added"
CUT_OFF = re.compile(
    r"(?:(?:ing|ed)|\b(?:made|native|found|given|one|(?:that|which|who|whose|when|where|having)"
    r"(?:\s\S+)?))$"
)
# glosses of these need no article: pronouns, prepositions, and what cannot be counted (the most
# frequent in WordNet 3.0 among glosses that have none)
NO_ARTICLE_WORDS = """
    a an the any some someone something anyone anything one either each all both several many two
    of in on at by for from to used having people equipment food wood flesh inflammation removal
    water music clothing dishware porcelain
"""
NO_ARTICLE = frozenset(NO_ARTICLE_WORDS.split())
PLURAL = re.compile(r"(?i)\S*[^sui\W]s$")
VOWEL = re.compile(r"(?i)[ai]|e(?!u)|o(?!ne)|u(?!ni|se|su|ti)|hour|honest|heir")
# plural endings and what replaces them, as WordNet's own look-up does (morphy(7WN))
ENDINGS = (
    ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"),
    ("shes", "sh"), ("men", "man"), ("ies", "y"),
)  # fmt: skip


class WordNet:
    """Noun senses by name.

    Args:
        source: "wordnet" looks where Debian and NLTK keep it; else a folder with WordNet's
            index.noun and data.noun, or a zip file of such a folder.

    Raises:
        UserError: the files are missing, or are not WordNet's.
    """

    def __init__(self, source: str = "wordnet") -> None:
        place = _locate(source)
        try:
            index, self._data, exceptions = _read(place)
            self._offsets = dict(_index_lines(index))
            last = max(itertools.chain.from_iterable(self._offsets.values()), default=0)
            if not self._data.startswith(b"%08d " % last, last):
                raise UserError("data.noun is not that of index.noun")
            self._base_forms = {
                words[0]: words[1:]
                for words in (line.split() for line in exceptions.decode().splitlines())
                if words
            }
        except UNREADABLE as error:
            raise UserError(f"{place} holds no readable WordNet ({error}): {FIX}") from None

    def senses(self, name: str) -> list[str]:
        """A phrase for each sense of the noun, the most usual first; none for an unknown name."""
        return [candidate.meaning for candidate in self.candidates(name)]

    def candidates(self, name: str) -> list[Candidate]:
        """A candidate for each sense of the noun, the most usual first; none for an unknown name."""
        word = "_".join(name.replace("_", " ").casefold().split())
        offsets = dict.fromkeys(
            offset for form in self._forms(word) for offset in self._offsets.get(form, ())
        )
        found: dict[str, Candidate] = {}
        for offset in offsets:
            kind, gloss = self._synset(offset)
            phrase = sense_phrase(gloss)
            if phrase:
                sense = Candidate(phrase, "lexicon", text=sense_text(gloss), thing=kind in THINGS)
                found.setdefault(phrase, sense)
        return list(found.values())

    def _forms(self, word: str) -> Iterator[str]:
        """The word, and what it may be the plural of."""
        yield word
        irregular = self._base_forms.get(word)
        if irregular:
            yield from irregular
            return
        if word.endswith("ss") or len(word) < 3:  # a boss is not the plural of the genus Bos
            return
        for ending, singular in ENDINGS:
            if word.endswith(ending):
                yield word.removesuffix(ending) + singular

    def _synset(self, offset: int) -> tuple[bytes, str]:
        """The kind and the gloss of the synset whose line begins at this byte."""
        line, _, _ = self._data[offset : offset + LONGEST_LINE].partition(b"\n")
        return line[9:11], line.decode(errors="replace").partition(" | ")[2]


def sense_text(gloss: str) -> str:
    """The whole gloss without examples and parentheses: what tells a sense from others."""
    text = re.split(r'[;:]?\s*"', re.sub(r"\([^()]*\)", " ", gloss[:MOST_CHARS]), maxsplit=1)[0]
    return " ".join(text.split())


def sense_phrase(gloss: str) -> str:
    """A gloss as a phrase of at most `MAX_WORDS` words with an article; "" where none is left.

    Examples and what is in parentheses are left out. A gloss that is too long, or not a phrase by
    `clean_phrase`, ends earlier, where a clause does if possible.
    """
    text = re.split(r"[;:]", re.sub(r"\([^()]*\)", " ", gloss[:MOST_CHARS]), maxsplit=1)[0]
    text = _with_article(ABOUT.sub("", " ".join(text.split())))
    cuts = [text[: cut.start()].rstrip(" ,") for cut in BOUNDARY.finditer(text)][::-1]
    short = [part for part in cuts if 1 < len(part.split()) <= MAX_WORDS]
    whole = [part for part in short if len(part.split()) > 2 and not CUT_OFF.search(part)]
    if len(text.split()) <= MAX_WORDS:
        whole.insert(0, text)
    words = text.split()[:MAX_WORDS]
    anywhere = (" ".join(words[:end]).rstrip(" ,") for end in range(len(words), 2, -1))
    return next(filter(None, map(clean_phrase, (*whole, *short, text, *anywhere))), "")


def installed_lexicon(setting: str) -> WordNet | None:
    """What `meaning.lexicon` names: "auto" is WordNet where it is installed, "off" is none.

    Raises:
        UserError: it is named, and missing.
    """
    if setting == "off":
        return None
    if setting != "auto":
        return WordNet(setting)
    try:
        return WordNet()
    except UserError:
        return None


def _with_article(text: str) -> str:
    words = BOUNDARY.split(text)[0].replace(",", " ").split()
    if not words or NO_ARTICLE & {words[0].casefold(), words[-1].casefold()}:
        return text
    if PLURAL.match(words[0]) or PLURAL.match(words[-1]):  # or a verb: "lifts heavy objects"
        return text
    return f"{'an' if VOWEL.match(text) else 'a'} {text}"


def _index_lines(index: bytes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(lemma, offsets of its synsets): `lemma pos n p_cnt [pointers] n tagged offset...`."""
    for line in index.decode().splitlines():
        fields = line.split()
        if fields and not line.startswith(" "):  # the licence is indented
            yield fields[0], tuple(int(field) for field in fields[-int(fields[2]) :])


def _read(place: Path) -> list[bytes]:
    """The files `FILES`; irregular plurals may be missing."""
    if place.is_dir():
        return [
            (place / name).read_bytes() if name != "noun.exc" or (place / name).is_file() else b""
            for name in FILES
        ]
    with zipfile.ZipFile(place) as archive:
        inside = {Path(name).name: name for name in archive.namelist()}
        return [
            archive.read(inside[name]) if name != "noun.exc" or name in inside else b""
            for name in FILES
        ]


def _places() -> Iterator[Path]:
    """Where Debian, Homebrew and NLTK's downloader put WordNet; the last leaves it zipped."""
    yield from map(Path, SYSTEM_FOLDERS)
    given = os.environ.get("NLTK_DATA", "")
    roots = [Path(part) for part in given.split(os.pathsep) if part]
    roots += [Path.home() / "nltk_data"]
    roots += [Path(sys.prefix) / below for below in ("nltk_data", "share/nltk_data")]
    roots += [Path(top) / "nltk_data" for top in ("/usr/share", "/usr/local/share", "/usr/lib")]
    for root in roots:
        yield root / "corpora" / "wordnet"
        yield root / "corpora" / "wordnet.zip"


def _locate(source: str) -> Path:
    for place in _places() if source == "wordnet" else [Path(source).expanduser()]:
        if (place / "data.noun").is_file() or (place.suffix == ".zip" and place.is_file()):
            return place
    raise UserError(f"no WordNet in {source if source != 'wordnet' else 'its usual places'}: {FIX}")
