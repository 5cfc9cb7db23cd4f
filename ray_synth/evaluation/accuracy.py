"""Exact top-1 and top-5 counts, and their intervals. Pure; no Ray.

Counts are added over batches, so the result is the same whatever the batches were.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def hits(logits: np.ndarray, labels: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Whether each row's label is its best, and among its five best.

    Args:
        logits: (rows, classes) float.
        labels: (rows,) class indices.
        allowed: class indices to choose among (test sets with some of the classes), or None.

    Returns:
        (rows, 2) bool: top-1, top-5. Ties go to the lower class index.
    """
    scores = np.asarray(logits, dtype=np.float64)
    if allowed is not None:
        masked = np.full_like(scores, -np.inf)
        masked[:, allowed] = scores[:, allowed]
        scores = masked
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    right = best == np.asarray(labels)[:, None]
    return np.stack([right[:, 0], right.any(axis=1)], axis=1)


class Tally:
    """Counts by (model, test set, class): images, top-1 hits, top-5 hits."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._counts: dict[tuple[str, str], np.ndarray] = {}

    def add(self, model: str, test_set: str, labels: np.ndarray, right: np.ndarray) -> None:
        """Add a batch's `hits`."""
        counts = self._counts.setdefault(
            (model, test_set), np.zeros((self.num_classes, 3), dtype=np.int64)
        )
        rows = np.column_stack([np.ones(len(labels), dtype=np.int64), right.astype(np.int64)])
        np.add.at(counts, labels, rows)

    def results(self, class_names: Iterable[str]) -> dict[tuple[str, str], dict[str, Any]]:
        """For each (model, test set): top1, top5, their intervals, counts and classes."""
        names = list(class_names)
        return {key: _summary(counts, names) for key, counts in self._counts.items()}


def _summary(counts: np.ndarray, names: list[str]) -> dict[str, Any]:
    images, top1, top5 = (int(total) for total in counts.sum(axis=0))
    return {
        "top1": 100 * top1 / images,
        "top1_interval": interval(top1, images),
        "top5": 100 * top5 / images,
        "top5_interval": interval(top5, images),
        "images": images,
        "by_class": {
            name: 100 * int(row[1]) / int(row[0])
            for name, row in zip(names, counts, strict=True)
            if row[0]
        },
    }


def interval(right: int, images: int) -> list[float]:
    """95% Wilson interval of a share, in percent."""
    from scipy.stats import binomtest

    found = binomtest(right, images).proportion_ci(confidence_level=0.95, method="wilson")
    return [100 * float(found.low), 100 * float(found.high)]
