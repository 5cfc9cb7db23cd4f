"""Exact counts, calibration, and the intervals of both. Pure; no Ray.

Counts are added over batches, so the result is the same whatever the batches were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

VERDICT = ("top1", "top5", "confidence", "nll")
BINS = 15  # of the calibration error, as in Guo et al. (arXiv 1706.04599)
BASELINES = ("real_only", "recipe")  # the first that was trained is what gains are over


def judge(logits: np.ndarray, labels: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """What a model made of some images.

    Args:
        logits: (rows, classes) float.
        labels: (rows,) class indices.
        allowed: class indices to choose among (test sets with some of the classes), or None.

    Returns:
        (rows, 4) float64, the columns of `VERDICT`: whether the label is the best class, and among
        the five best (ties go to the lower class index); the probability given to the best class; and
        the negative log likelihood of the label, in nats.
    """
    from scipy.special import log_softmax

    scores = np.asarray(logits, dtype=np.float64)
    if allowed is not None:
        masked = np.full_like(scores, -np.inf)
        masked[:, allowed] = scores[:, allowed]
        scores = masked
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    right = best == np.asarray(labels)[:, None]
    log_probabilities = log_softmax(scores, axis=1)
    rows = np.arange(len(scores))
    return np.column_stack(
        [
            right[:, 0],
            right.any(axis=1),
            np.exp(log_probabilities[rows, best[:, 0]]),
            -log_probabilities[rows, labels],
        ]
    )


class Tally:
    """Sums by (model, test set): of each class, of each calibration bin, and against the baselines."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._sums: dict[tuple[str, str], _Sums] = {}

    def add(self, model: str, test_set: str, labels: np.ndarray, verdicts: np.ndarray) -> None:
        """Add a batch of one model's verdicts (`judge`)."""
        self.add_all(test_set, labels, {model: verdicts})

    def add_all(
        self, test_set: str, labels: np.ndarray, verdicts: Mapping[str, np.ndarray]
    ) -> None:
        """Add all models' verdicts on one batch of images."""
        bases = {name: verdicts[name] for name in BASELINES if name in verdicts}
        for model, found in verdicts.items():
            sums = self._sums.setdefault((model, test_set), _Sums(self.num_classes))
            sums.add(labels, found, {} if model in bases else bases)

    def results(self, class_names: Iterable[str]) -> dict[tuple[str, str], dict[str, Any]]:
        """For each (model, test set): top1, top5, intervals, calibration, classes, and the gains.

        `gain` is over the first of `BASELINES` that was trained, which it names as `over`; where both
        were, `gain_over_recipe` is over the other.
        """
        names = list(class_names)
        return {key: sums.summary(names) for key, sums in self._sums.items()}


class _Sums:
    """Integer counts and float sums of one model on one test set."""

    def __init__(self, num_classes: int) -> None:
        self.classes = np.zeros((num_classes, 3), dtype=np.int64)  # images, top-1, top-5
        self.bins = np.zeros((BINS, 3))  # images, confidence, top-1
        self.nll = 0.0
        # baseline -> only this model right, only the baseline
        self.pairs: dict[str, np.ndarray] = {}

    def add(self, labels: np.ndarray, found: np.ndarray, bases: Mapping[str, np.ndarray]) -> None:
        top1, top5, confidence, nll = found.T
        ones = np.ones(len(labels))
        rows = np.column_stack([ones, top1, top5]).astype(np.int64)
        np.add.at(self.classes, labels, rows)
        places = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        np.add.at(self.bins, places, np.column_stack([ones, confidence, top1]))
        self.nll += float(nll.sum())
        mine = top1.astype(bool)
        for name, base in bases.items():
            theirs = base[:, 0].astype(bool)
            pairs = np.array([(mine & ~theirs).sum(), (~mine & theirs).sum()])
            self.pairs[name] = self.pairs.get(name, 0) + pairs

    def summary(self, names: list[str]) -> dict[str, Any]:
        images, top1, top5 = (int(total) for total in self.classes.sum(axis=0))
        seen = self.bins[self.bins[:, 0] > 0]
        result = {
            "top1": 100 * top1 / images,
            "top1_interval": interval(top1, images),
            "top5": 100 * top5 / images,
            "top5_interval": interval(top5, images),
            "images": images,
            "nll": self.nll / images,
            # Expected calibration error in points: |confidence - accuracy|, weighted by images.
            "ece": 100 * float(np.abs(seen[:, 1] - seen[:, 2]).sum()) / images,
            "calibration": [
                {"images": int(n), "confidence": 100 * conf / n, "top1": 100 * right / n}
                for n, conf, right in seen
            ],
            "by_class": {
                name: 100 * int(row[1]) / int(row[0])
                for name, row in zip(names, self.classes, strict=True)
                if row[0]
            },
            "class_images": {
                name: int(row[0]) for name, row in zip(names, self.classes, strict=True) if row[0]
            },
        }
        for name, (only_after, only_before) in self.pairs.items():
            gain = paired_gain(int(only_after), int(only_before), images)
            key = "gain" if "gain" not in result else f"gain_over_{name}"
            result[key] = {**gain, "over": name}
        return result


def by_shots(result: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Top-1 of classes with many, medium and few training images, over their test images.

    The bounds are those of the long-tailed sets ImageNet-LT and Places-LT (arXiv 1904.05160).

    Args:
        result: of one model on one test set, with `by_class` and `class_images`.
        counts: training images by class name.

    Returns:
        Group -> `top1`, `classes`, `images`; empty where all classes are in one group.
    """
    groups: dict[str, list[str]] = {"many": [], "medium": [], "few": []}
    for name in result["by_class"]:
        count = counts.get(name, 0)
        groups["many" if count > 100 else "medium" if count >= 20 else "few"].append(name)
    if sum(map(bool, groups.values())) < 2:
        return {}
    images, top1 = result["class_images"], result["by_class"]
    found = {}
    for group, names in groups.items():
        total = sum(images[name] for name in names)
        if total:
            mean = sum(top1[name] * images[name] for name in names) / total
            found[group] = {"top1": mean, "classes": len(names), "images": total}
    return found


def add_shots(results: dict[str, Any], counts: Mapping[str, int]) -> None:
    """Put `shots` (`by_shots`) into every result of a tree, where there are groups to tell apart."""
    if "by_class" in results:
        if shots := by_shots(results, counts):
            results["shots"] = shots
        return
    for node in results.values():
        if isinstance(node, dict):
            add_shots(node, counts)


def paired_gain(only_after: int, only_before: int, images: int) -> dict[str, Any]:
    """The gain of one model over another on the same images, in points.

    Args:
        only_after, only_before: images that only the one, or only the other, got right.

    Returns:
        `top1`; `interval`, 95%, of Bonett and Price (Computational Statistics & Data Analysis 56,
        2012); `p_value` of the exact McNemar test; `verdict`: gain | loss | unclear.
    """
    from scipy.stats import binomtest, norm

    after, before = (only_after + 1) / (images + 2), (only_before + 1) / (images + 2)
    difference = after - before
    half = norm.ppf(0.975) * ((after + before - difference**2) / (images + 2)) ** 0.5
    low, high = 100 * max(-1.0, difference - half), 100 * min(1.0, difference + half)
    differing = only_after + only_before
    return {
        "top1": 100 * (only_after - only_before) / images,
        "interval": [float(low), float(high)],
        "p_value": float(binomtest(only_after, differing).pvalue) if differing else 1.0,
        "verdict": "gain" if low > 0 else "loss" if high < 0 else "unclear",
    }


def interval(right: int, images: int) -> list[float]:
    """95% Wilson interval of a share, in percent."""
    from scipy.stats import binomtest

    found = binomtest(right, images).proportion_ci(confidence_level=0.95, method="wilson")
    return [100 * float(found.low), 100 * float(found.high)]
