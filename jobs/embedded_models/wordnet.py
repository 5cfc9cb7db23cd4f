"""WordNet's nouns as JSON: names, gloss and hypernyms of each, and of the photographs' classes.

In: `data/wordnet/data.noun` (WordNet 3.0's database file) and Tiny-ImageNet's `wnids.txt`.
Out: `work/wordnet.json`, read back as a `Lexicon`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from jobs.embedded_models.settings import Settings

MAX_HYPERNYMS = 12


@dataclass(frozen=True)
class Noun:
    """One sense of a noun.

    Attributes:
        lemmas: its names, most usual first.
        gloss: its definition, without the examples of use.
        hypernyms: first names of what it is a kind of, nearest first.
    """

    lemmas: tuple[str, ...]
    gloss: str
    hypernyms: tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """All nouns, and the classes of the photographs in the order of their labels."""

    corpus: tuple[Noun, ...]
    classes: tuple[Noun, ...]


@dataclass(frozen=True)
class _Synset:
    lemmas: tuple[str, ...]
    gloss: str
    parents: tuple[str, ...]


def read_synset(line: str) -> tuple[str, _Synset]:
    """Reads one line of `data.noun` (the format is WordNet's manual page wndb(5WN)).

    Returns:
        The synset's offset, which is also the digits of its ImageNet id, and the synset.
    """
    fields, _, gloss = line.partition(" | ")
    words = fields.split()
    count = int(words[3], 16)
    lemmas = tuple(word.replace("_", " ") for word in words[4 : 4 + 2 * count : 2])
    pointers = words[5 + 2 * count :]
    parents = tuple(
        offset
        for symbol, offset in zip(pointers[0::4], pointers[1::4], strict=False)
        if symbol in ("@", "@i")
    )
    definition = re.split(r';\s*"', gloss.strip())[0].strip()
    return words[0], _Synset(lemmas, definition, parents)


def ancestors(offset: str, synsets: dict[str, _Synset]) -> Iterator[str]:
    """First names of everything that a synset is a kind of, nearest first, each once."""
    seen, queue = {offset}, [*synsets[offset].parents]
    while queue:
        parent = queue.pop(0)
        if parent in seen or parent not in synsets:
            continue
        seen.add(parent)
        yield synsets[parent].lemmas[0]
        queue += synsets[parent].parents


def _noun(offset: str, synsets: dict[str, _Synset]) -> Noun:
    names = tuple(islice(ancestors(offset, synsets), MAX_HYPERNYMS))
    return Noun(synsets[offset].lemmas, synsets[offset].gloss, names)


def build_lexicon(settings: Settings) -> Path:
    """Writes `work/wordnet.json` from WordNet's and Tiny-ImageNet's files; returns it.

    Raises:
        ValueError: a file is missing, or a class id is not a noun of this WordNet.
    """
    database = settings.input(
        "wordnet/data.noun", "the `dict` folder of WordNet 3.0 (wordnet.princeton.edu)"
    )
    class_ids = settings.input(
        "tiny-imagenet-200/wnids.txt", "Tiny-ImageNet's unpacked archive"
    ).read_text(encoding="utf-8")
    with database.open(encoding="utf-8") as lines:
        # The licence comes first, on lines that begin with two spaces.
        synsets = dict(read_synset(line) for line in lines if not line.startswith("  "))

    classes = []
    for class_id in class_ids.split():
        if class_id[1:] not in synsets:
            raise ValueError(f"{class_id} is not a noun of {database}: use WordNet 3.0, not 3.1.")
        classes.append(_noun(class_id[1:], synsets))
    lexicon = Lexicon(tuple(_noun(offset, synsets) for offset in synsets), tuple(classes))
    path = settings.work / "wordnet.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(lexicon), ensure_ascii=False), encoding="utf-8")
    return path


def read_lexicon(path: Path) -> Lexicon:
    """Reads what `build_lexicon` wrote."""

    def nouns(rows: list[dict]) -> tuple[Noun, ...]:
        return tuple(
            Noun(tuple(row["lemmas"]), row["gloss"], tuple(row["hypernyms"])) for row in rows
        )

    parts = json.loads(path.read_text(encoding="utf-8"))
    return Lexicon(nouns(parts["corpus"]), nouns(parts["classes"]))
