"""What a classifier says of pictures: files and folders in, a class and its probability per picture out.

Pictures come from strangers: they are read and decoded with the limits of training, a batch at a time,
and one that cannot be is named and passed over.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from ray_synth.data.images import EXTENSIONS, MAX_PIXELS
from ray_synth.data.listing import ending, list_files
from ray_synth.data.places import Place
from ray_synth.errors import UserError
from ray_synth.export.classifier import Classifier
from ray_synth.storage.filesystems import open_uri, without_file_scheme

BATCH = 64


@dataclass(frozen=True)
class Picture:
    """A picture by the name that a person knows it by, and where it is read from."""

    name: str
    place: Place


@dataclass(frozen=True)
class Prediction:
    """What was said of a picture.

    Attributes:
        top: (class name, probability) of the likeliest classes, best first; empty where the picture
            could not be read.
        error: why it could not.
    """

    name: str
    top: list[tuple[str, float]]
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """`image`, and `class_name`, `probability` and `top`, or `error`."""
        if self.error:
            return {"image": self.name, "error": self.error}
        top = [{"class_name": name, "probability": value} for name, value in self.top]
        return {"image": self.name, **top[0], "top": top}


@dataclass(frozen=True)
class Pictures:
    """Pictures that some paths or URIs name; made one by one, since a folder may hold millions.

    Attributes:
        groups: (URI, folder as the file system knows it, folder as a person does, names in it).
        others: files of folders that were passed over, being no pictures by their ending.
    """

    groups: list[tuple[str, str, str, list[str]]]
    others: int

    def __len__(self) -> int:
        return sum(len(names) for *_, names in self.groups)

    def __iter__(self) -> Iterator[Picture]:
        for uri, path, shown, names in self.groups:
            for name in names:
                yield Picture(f"{shown}{name}", Place(uri, f"{path}{name}"))


def find_pictures(given: Sequence[str]) -> Pictures:
    """The pictures of some paths or URIs, in their order; of folders, all below them by name.

    Raises:
        UserError: there is no such file, or no picture in any of them.
    """
    groups, others = [], 0
    for text in given:
        uri = without_file_scheme(text)
        filesystem, path = open_uri(uri)
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.NotFound:
            raise UserError(f"no such picture or folder: {text}")
        if kind == pafs.FileType.Directory:
            files = list_files(filesystem, path).files
            named = [file for file in files if ending(file) in EXTENSIONS]
            others += len(files) - len(named)
            root = text.partition("?")[0] if "://" in text else text
            groups.append((uri, f"{path.rstrip('/')}/", f"{root.rstrip('/')}/", named))
        else:
            groups.append((uri, path, text, [""]))
    pictures = Pictures(groups, others)
    if not len(pictures):
        raise UserError(
            f"no pictures in {', '.join(given)}: their names end with none of {', '.join(EXTENSIONS)}"
        )
    return pictures


def predict(
    classifier: Classifier,
    pictures: Iterable[Picture],
    *,
    top: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Prediction]:
    """What a classifier says of each picture, in their order, as batches are done.

    Args:
        top: classes that are named of each picture.
    """
    from ray_synth.training.decoder import decode_all

    waiting = iter(pictures)
    while some := list(itertools.islice(waiting, BATCH)):
        places = [p.place._replace(value_range=classifier.value_range) for p in some]
        images, errors = decode_all(places, [0] * len(some), classifier.transform, max_pixels)
        good = [at for at in range(len(some)) if at not in errors]
        answers = iter(
            classifier.classify(np.ascontiguousarray(images.numpy()[good])) if good else ()
        )
        for at, picture in enumerate(some):
            if at in errors:
                yield Prediction(picture.name, [], errors[at])
            else:
                yield Prediction(picture.name, _best(next(answers), classifier.class_names, top))


def _best(row: np.ndarray, names: list[str], top: int) -> list[tuple[str, float]]:
    order = np.argsort(-row, kind="stable")[:top]
    return [(names[at], float(row[at])) for at in order]
