"""What any picture is like to a CLIP: how similar a text is to images of other things.

Features go in; sums come out that say the mean and the spread of any text's similarity over all of them,
in memory that does not grow with their number. The other classes of a data set are the background of
each class; some pictures of many things that the package carries stand in where there are none.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("ray_synth")
FOLDER = Path(__file__).parent / "background_files"  # made by jobs/background.py
SIDE, COLUMNS = 64, 20  # pixels of a picture, pictures in a row of the sheet
# The package's pictures count as so many images beside those of a data set's other classes: alone they
# decide, against 144 (9 classes of 16) they settle little.
WORTH = 32.0
LEAST_SPREAD = 1e-4  # cosine similarity


@dataclass(frozen=True, eq=False)
class Background:
    """Sums over images: how many, of their features, and of the features' outer products.

    Attributes:
        count: images; a part of one where the sums are weighted.
        total: (dim,) float64.
        squares: (dim, dim) float64.
    """

    count: float
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Background:
        """Of (num_images, dim) unit rows; none is a background that says nothing."""
        rows = np.asarray(features, np.float64)
        return cls(float(len(rows)), rows.sum(axis=0), rows.T @ rows)

    def __add__(self, other: Background) -> Background:
        return Background(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )

    def without(self, features: np.ndarray) -> Background:
        """What is left when images that were counted are taken out, as a class's own are."""
        own = Background.of(features)
        return Background(
            max(self.count - own.count, 0.0), self.total - own.total, self.squares - own.squares
        )

    def worth(self, count: float) -> Background:
        """The same mean and spread, as of so many images."""
        part = count / self.count
        return Background(count, self.total * part, self.squares * part)

    def of_texts(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each text's similarity over the images, (n,) each.

        Args:
            texts: (n, dim).
        """
        means = texts @ self.total / self.count
        second = (texts @ self.squares * texts).sum(axis=1) / self.count
        return means, np.sqrt((second - means**2).clip(LEAST_SPREAD**2))

    def save(self, path: Path) -> None:
        """A safetensors file; half of the symmetric matrix, in float32."""
        from safetensors.numpy import save_file

        half = self.squares[np.triu_indices(len(self.total))]
        rows = {"total": self.total, "squares": half, "count": np.array([self.count])}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: row.astype(np.float32) for name, row in rows.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Background:
        """What `save` wrote."""
        from safetensors.numpy import load_file

        rows = {name: row.astype(np.float64) for name, row in load_file(path).items()}
        dim = len(rows["total"])
        squares = np.zeros((dim, dim))
        squares[np.triu_indices(dim)] = rows["squares"]
        squares += np.triu(squares, 1).T
        return cls(float(rows["count"][0]), rows["total"], squares)


def beside(others: Background | None, shipped: Background | None) -> Background | None:
    """The background of a class: the other classes' images, and the package's pictures."""
    if others is None or others.count < 1:
        return shipped
    return others + shipped.worth(WORTH) if shipped else others


def pictures(path: Path = FOLDER / "pictures.jpg") -> list[Image.Image]:
    """The package's pictures of many things, SIDE x SIDE each."""
    from PIL import Image

    with Image.open(path) as sheet:
        whole = sheet.convert("RGB")
    return [
        whole.crop((x, y, x + SIDE, y + SIDE))
        for y in range(0, whole.height, SIDE)
        for x in range(0, whole.width, SIDE)
    ]


def shipped_background(clip: Any, *, cache: Path | None = None) -> Background:
    """What a CLIP takes the package's pictures for: measured once per model, and kept.

    Args:
        clip: a `ClipModel`; the embedded one's are in the package.
        cache: folder of the others'; default: ~/.cache/ray_synth.
    """
    if clip.name == "embedded":
        return Background.load(FOLDER / "embedded.safetensors")
    folder = Path.home() / ".cache" / "ray_synth" if cache is None else cache
    path = folder / f"background-{_identity(clip)}.safetensors"
    try:
        return Background.load(path)
    except Exception:  # missing, or half written by a process that died
        found = Background.of(clip.encode_images(pictures()))
    try:
        found.save(path)
    except OSError as error:
        log.debug("the background of %s is not kept: %s", clip.name, error)
    return found


def _identity(clip: Any) -> str:
    """Of the weights: two texts' embeddings tell models apart, whatever they are called."""
    rows: Sequence[Any] = clip.encode_texts(["a photo of a cat", "a drawing of a house"])
    return hashlib.sha256(np.asarray(rows, np.float32).round(2).tobytes()).hexdigest()[:16]
