"""Questions about pictures that are in no repository: names, files, and which of WordNet's senses fit.

more_pictures.yaml and a folder of unpacked packages go in; questions with image features come out, each
with the background of the other classes' images of its set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field

from ray_synth.config import Section, parse_config
from ray_synth.data.images import decode_image
from ray_synth.meaning.background import Background
from ray_synth.meaning.candidates import Candidate
from ray_synth.meaning.lexicon import WordNet

log = logging.getLogger("ray_synth")
MORE = Path(__file__).parent / "more_pictures.yaml"


class Shown(Section):
    """The file, or the folder of files, of a name, and the senses that it shows."""

    file: str
    shows: list[int] = Field(min_length=1)


class PictureSet(Section):
    """Names and files that come in one package; see more_pictures.yaml."""

    name: str
    install: str
    places: list[str]
    groups: dict[int, int]
    pictures: dict[str, Shown]

    def files(self, folder: Path, shown: Shown) -> list[Path]:
        """The images of a name, below the folder of all packages."""
        found = [folder / place / shown.file for place in self.places]
        return [
            file
            for path in found
            if path.exists()
            for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        ]


class PictureSets(Section):
    """The file more_pictures.yaml."""

    sets: list[PictureSet]


@dataclass(frozen=True)
class Question:
    """One question, with what is right.

    Attributes:
        images: (num_images, dim) features.
        others: of the other classes' images of the set.
        candidates: WordNet's senses of the name.
        shows: the places among them of those that are right.
    """

    class_name: str
    images: np.ndarray
    others: Background
    candidates: list[Candidate]
    shows: list[int]

    @property
    def right(self) -> set[str]:
        """The meanings that are right."""
        return {self.candidates[i].meaning for i in self.shows}


def load_sets(path: Path = MORE) -> list[PictureSet]:
    """Read more_pictures.yaml."""
    return parse_config(yaml.safe_load(path.read_text()), origin=str(path), model=PictureSets).sets


def all_questions(
    sets: list[PictureSet], folder: Path, clip: Any, wordnet: WordNet
) -> Iterator[tuple[str, list[Question]]]:
    """Questions by "SET, N images"; a set that is not in the folder is left out with a line."""
    for some in sets:
        rows = {
            shown.file: _features(clip, files)
            for shown in some.pictures.values()
            if (files := some.files(folder, shown))
        }
        if not rows:
            log.warning("no %s in %s: %s", some.name, folder, some.install)
            continue
        whole = Background.of(np.concatenate(list(rows.values())))
        for size in some.groups:
            yield (
                f"{some.name}, {size} image{'s' * (size > 1)}",
                [
                    Question(name, images, whole.without(rows[shown.file]), senses, shown.shows)
                    for name, shown in some.pictures.items()
                    if shown.file in rows
                    for senses in [wordnet.candidates(name)]
                    for images in _groups(rows[shown.file], size, some.groups[size])
                ],
            )


def _features(clip: Any, files: list[Path]) -> np.ndarray:
    return clip.encode_images([decode_image(file.read_bytes()) for file in files])


def _groups(rows: np.ndarray, size: int, most: int) -> list[np.ndarray]:
    """So many groups of so many images, drawn once; fewer where there are not enough."""
    order = np.random.default_rng(0).permutation(len(rows)) if most > 1 else np.arange(len(rows))
    return [rows[order[i : i + size]] for i in range(0, len(rows) - size + 1, size)][:most]
