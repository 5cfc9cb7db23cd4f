"""Class names as a config gives them: a list, ImageNet's own, or a text file with one per line."""

from __future__ import annotations

import os
from collections import Counter

from ray_synth.data import imagenet
from ray_synth.data.labels import tidy
from ray_synth.errors import UserError, shortened
from ray_synth.storage.texts import read_text


def read_class_names(given: list[str] | str | None) -> tuple[str, ...] | None:
    """The names in their order, trimmed and in NFC as labels are; None where the labels are the names.

    Args:
        given: names, `imagenet`, or the path or URI of a file: UTF-8, a name a line, blank lines aside.

    Raises:
        UserError: there is no such file, it holds no text or no name, or a name comes twice.
    """
    if given is None:
        return None
    if given == "imagenet":
        return imagenet.class_names()
    origin = "data.class_names"
    if isinstance(given, str):
        origin, given = given, _lines(given)
    names = [tidy(name) for name in given]
    if not names or not all(names):
        raise UserError(f"{origin} holds {'an empty' if names else 'no'} class name")
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise UserError(f"{origin}: class names must differ; given twice: {shortened(repeated, 5)}")
    return tuple(names)


def _lines(place: str) -> list[str]:
    """Lines of a file that hold something; a line ends at what any editor ends it by."""
    if "://" not in place and not os.path.isfile(place):
        hint = "; give a list as [cat, dog]" if "," in place else ""
        raise UserError(f"data.class_names: no file of class names at {place}{hint}")
    text = read_text(place)
    odd = next((c for c in text if c < "\t"), None)
    if odd is not None:
        raise UserError(f"{place} is no text file (it holds the byte {ord(odd)}): save it as UTF-8")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in lines if tidy(line)]
