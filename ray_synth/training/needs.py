"""Who gets the next images: budgets from what a learner says of itself. Pure.

More images go to classes that the learner is unsure of on real images, in the manner of feedback-guided
synthesis (Askari-Hemmat et al., arXiv 2310.00158) and Fill-Up (Shin et al., arXiv 2306.07200), and to
kinds, styles and scenes whose images it is unsure of although the checks let them pass: entropy is what
Deliberate Practice (Askari-Hemmat et al., arXiv 2502.15588) selects images by. What few images say counts
little, and a floor is left to all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_synth.generation.draws import PASSES, prior

FEWEST, STRONGEST = 1.0, 20.0  # images that the prior of a class counts for, at least and at most
PRIOR = 10.0  # images that say of a kind or style what is usual, beside its own
TAKEN_FOR = 0.05  # probability of another class from which a class is taken for it


def class_weakness(classes: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """How unsure the learner is of each class, (num_classes,) in 0..1.

    The mean of 1 - the probability of the right class (unlike the loss it is bounded: one wrong label
    does not decide), drawn towards all classes' mean: by a beta prior whose strength is found by moments
    of the errors, so that differences that are chance count little.

    Args:
        classes: of `scores.by_class`: `images`, `doubt` and `error` of each.
    """
    images = np.array([item["images"] for item in classes], float)
    doubt = np.array([item.get("doubt", 0.0) for item in classes])
    wrong = images * np.array([item.get("error", 0.0) for item in classes])
    if not images.sum():
        return np.full(len(classes), 0.5)
    usual = float((doubt * images).sum() / images.sum())
    strength = prior(wrong, images, float(wrong.sum() / images.sum()))
    strength = float(np.clip(strength, FEWEST, STRONGEST))
    return (doubt * images + strength * usual) / (images + strength)


def class_images(total: int, weakness: np.ndarray, floor: float) -> np.ndarray:
    """`total` images over the classes, (num_classes,) int64: a share `floor` of them alike, and one for
    each class at least; the rest by weakness.

    Args:
        total: at least as many as there are classes.
    """
    classes = len(weakness)
    assert total >= classes, f"{total} images for {classes} classes"
    alike = min(total, max(classes, round(floor * total)))
    whole = weakness.sum()
    shares = weakness / whole if whole > 0 else np.full(classes, 1 / classes)
    return _dealt(np.full(classes, alike / classes) + (total - alike) * shares, total)


def _dealt(wanted: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of the sum `total`, by largest remainders; of equal ones the first."""
    found = np.floor(wanted + 1e-9).astype(np.int64)
    rest = total - int(found.sum())
    order = np.argsort(-(wanted - found).round(9), kind="stable")
    found[order[:rest]] += 1
    return found


def usefulness(
    entropies: Mapping[str, Mapping[str, Any]],
    accepted: Mapping[str, Sequence[int]],
    values: Sequence[str],
) -> np.ndarray:
    """What a made image of each kind, style or scene is worth, relative to the mean of all; (n,) float.

    The learner's mean entropy on those that were accepted, times the share that was; both drawn towards
    what is usual by `PRIOR` images. An image that the checks refuse is worth nothing.

    Args:
        entropies: of a column of the scores: value -> `images`, `entropy`.
        accepted: value -> [accepted, made].
        values: all kinds, styles or scenes of a class; one that was not seen is as usual.
    """
    seen = np.array([entropies.get(v, {}).get("images", 0) for v in values], float)
    entropy = np.array([entropies.get(v, {}).get("entropy", 0.0) for v in values])
    passed, made = np.array([accepted.get(v, (0, 0)) for v in values], float).reshape(-1, 2).T
    if not seen.sum() or not made.sum() or not (entropy * seen).sum():
        return np.ones(len(values))
    usual, share = (entropy * seen).sum() / seen.sum(), passed.sum() / made.sum()
    worth = (entropy * seen + PRIOR * usual) / (seen + PRIOR)
    worth *= (passed + PRIOR * share) / (made + PRIOR)
    return worth / worth.mean()


def with_floor(worth: np.ndarray, floor: float) -> np.ndarray:
    """Factors around 1: a share `floor` alike, the rest by worth."""
    return floor + (1 - floor) * worth


def kind_mix(
    mix: Mapping[str, float], synthetic: Mapping[str, Any], floor: float
) -> dict[str, float]:
    """The config's mix of kinds, each more or less by what its images are worth."""
    kinds = [kind for kind, share in mix.items() if share > 0]
    worth = usefulness(synthetic["kind"], synthetic["accepted"]["kind"], kinds)
    factors = with_floor(worth, floor).round(6).tolist()
    return {kind: mix[kind] * factor for kind, factor in zip(kinds, factors, strict=True)}


def item_draws(
    items: Sequence[str],
    entropies: Mapping[str, Mapping[str, Any]],
    accepted: Mapping[str, Sequence[int]],
    floor: float,
    draws: Sequence[int] = (),
) -> list[int]:
    """In how many of `PASSES` passes each style, or each scene of a class, is drawn.

    Args:
        entropies, accepted: as of `usefulness`.
        draws: how often each would be drawn otherwise; empty: all alike.
    """
    worth = usefulness(entropies, accepted, items)
    wanted = with_floor(worth, floor) * np.array(draws or [1] * len(items), float)
    most = wanted.max(initial=1e-9)
    return np.clip(np.round(PASSES * wanted / most), 1, PASSES).astype(int).tolist()


def confused_pairs(classes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """class -> the one that it is most taken for; classes that are not taken for another are left out."""
    found = {}
    for item in classes:
        for other, probability, _ in item.get("confused", [])[:1]:
            if probability >= TAKEN_FOR:
                found[item["class_name"]] = other
    return found


def weakest(weakness: np.ndarray, share: float = 0.1) -> list[int]:
    """The weakest tenth of the classes, one at least; of equal ones the first."""
    most = max(1, round(share * len(weakness)))
    return np.argsort(-weakness, kind="stable")[:most].tolist()
