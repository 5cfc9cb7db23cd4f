"""A dictionary's senses of a name as candidates: WordNet, read by NLTK.

Optional: `pip install 'ray-synth[lexicon]'`, and WordNet's files from `python -m nltk.downloader
wordnet`, Debian's package wordnet-base, or a folder of your own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ray_synth.meaning.answers import MAX_WORDS, clean_phrase
from ray_synth.meaning.candidates import with_article

SYSTEM_FOLDERS = ("/usr/share/wordnet", "/usr/local/share/wordnet", "/opt/homebrew/share/wordnet")
MEND = (
    "install the extra ray-synth[lexicon], and WordNet by `python -m nltk.downloader wordnet` or "
    "Debian's package wordnet-base, or name its folder in meaning.lexicon"
)
# where a gloss that is too long may end, before the word
BOUNDARY = re.compile(
    r"\s(?:of|in|on|at|with|for|from|by|that|which|who|having|used|and|or|as|to)\s"
)


class WordNet:
    """Noun senses by name.

    Args:
        source: "wordnet" looks where NLTK and Debian keep it; else a folder with WordNet's data.noun.

    Raises:
        ValueError: NLTK or the files are missing.
    """

    def __init__(self, source: str = "wordnet") -> None:
        try:
            from nltk.corpus.reader.wordnet import WordNetCorpusReader
            from nltk.data import FileSystemPathPointer
        except ImportError:
            raise ValueError(f"the lexicon needs NLTK: {MEND}") from None
        folder = _folder(source)
        reader: Any = WordNetCorpusReader
        self._wordnet = reader(FileSystemPathPointer(str(folder)), None)

    def senses(self, name: str) -> list[str]:
        """A phrase for each sense of the noun, the most usual first; none for an unknown name."""
        found = self._wordnet.synsets(name.strip().replace(" ", "_"), pos="n")
        phrases = (sense_phrase(synset.definition()) for synset in found)
        return list(dict.fromkeys(phrase for phrase in phrases if phrase))


def sense_phrase(gloss: str) -> str:
    """A gloss as a phrase of at most `MAX_WORDS` words with an article; "" where none is left."""
    text = re.sub(r"\([^()]*\)", " ", gloss).split(";")[0]
    text = " ".join(text.split())
    while len(with_article(text).split()) > MAX_WORDS:
        cuts = [match.start() for match in BOUNDARY.finditer(text)]
        if not cuts or cuts[-1] == 0:
            break
        text = text[: cuts[-1]].rstrip(" ,")
    return clean_phrase(with_article(text) if text else "")


def _folder(source: str) -> Path:
    if source != "wordnet":
        places = [Path(source)]
    else:
        import nltk

        places = [Path(path) / "corpora" / "wordnet" for path in nltk.data.path]
        places += [Path(path) for path in SYSTEM_FOLDERS]
    for place in places:
        if (place / "data.noun").is_file():
            return place
    raise ValueError(
        f"no WordNet in {source if source != 'wordnet' else 'its usual places'}: {MEND}"
    )


__all__ = ["WordNet", "sense_phrase"]
