"""Does an image show its own class, or rather another? CLIP compares it with all classes.

Features of every class's meaning and of its few real images go in; one prototype per class and the
least margin that passes come out. Classes are compared with each other, never a score with a number:
a style that lowers all similarities alike changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Prototypes:
    """One direction per class in CLIP's space.

    Attributes:
        classes: (num_classes,) class indices, ascending.
        rows: (num_classes, dim) float32 unit rows.
    """

    classes: np.ndarray
    rows: np.ndarray

    def margin(self, class_index: int, feature: np.ndarray) -> tuple[float, int] | None:
        """How much nearer an image is to its class than to the nearest other, and which that is.

        Args:
            feature: (dim,) of length 1.

        Returns:
            The difference of cosine similarities, negative where the other is nearer; None for a
            class without a prototype, and where there is no other class.
        """
        own = int(np.searchsorted(self.classes, class_index))
        if len(self.classes) < 2 or own == len(self.classes) or self.classes[own] != class_index:
            return None
        scores = self.rows @ feature
        others = np.delete(scores, own)
        rival = int(others.argmax())
        return float(scores[own] - others[rival]), int(np.delete(self.classes, own)[rival])


def prototypes(texts: Mapping[int, np.ndarray], real: Mapping[int, np.ndarray]) -> Prototypes:
    """Each class's meaning and the mean of its real images, both relative to the mean of all classes.

    CLIP's texts and images lie apart (Liang et al. 2022, the modality gap), and what all classes share
    tells none of them from another: so each kind is centred over the classes before the two are added
    with equal weight. A class without real images is its meaning alone.

    Args:
        texts: class index -> (dim,) unit row.
        real: class index -> (n, dim) unit rows, n may be 0.
    """
    classes = np.array(sorted(texts), np.int64)
    if not len(classes):
        return Prototypes(classes, np.zeros((0, 0), np.float32))
    by_text = _centred_texts(classes, texts)
    means = {index: rows.mean(axis=0) for index, rows in real.items() if len(rows)}
    middle = _middle(means)
    rows = [
        _prototype(by_text[at], means[index] - middle if index in means else None)
        for at, index in enumerate(classes.tolist())
    ]
    return Prototypes(classes, np.stack(rows).astype(np.float32))


def least_margin(
    texts: Mapping[int, np.ndarray], real: Mapping[int, np.ndarray], quantile: float
) -> float | None:
    """The margin below which an image is taken for another class's.

    It is the quantile of the real images' own margins, each against prototypes that it had no part
    in, and never above 0: what is nearest to its own class passes.

    Args:
        texts, real: see `prototypes`.
        quantile: the share of real images that may fail.

    Returns:
        None where no class has real images, or there is but one class.
    """
    found = prototypes(texts, real)
    if len(found.classes) < 2 or not any(len(rows) for rows in real.values()):
        return None
    by_text = _centred_texts(found.classes, texts)
    middle = _middle({index: rows.mean(axis=0) for index, rows in real.items() if len(rows)})
    margins = []
    for at, index in enumerate(found.classes.tolist()):
        own = real.get(index, np.zeros((0, found.rows.shape[1])))
        if not len(own):
            continue
        others = np.delete(found.rows, at, axis=0)
        left_out = (own.sum(axis=0) - own) / max(len(own) - 1, 1)  # (n, dim): without each image
        for feature, rest in zip(own, left_out, strict=True):
            without = _prototype(by_text[at], rest - middle if len(own) > 1 else None)
            margins.append(float(feature @ without - (others @ feature).max()))
    return round(min(0.0, float(np.quantile(margins, quantile))), 6)


def _centred_texts(classes: np.ndarray, texts: Mapping[int, np.ndarray]) -> np.ndarray:
    stack = np.stack([texts[index] for index in classes.tolist()])
    return _unit(stack - stack.mean(axis=0)) if len(stack) > 1 else stack


def _middle(means: Mapping[int, np.ndarray]) -> np.ndarray | float:
    return np.mean(list(means.values()), axis=0) if len(means) > 1 else 0.0


def _prototype(text: np.ndarray, image: np.ndarray | None) -> np.ndarray:
    return _unit(text if image is None else text + _unit(image))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True).clip(1e-12)
