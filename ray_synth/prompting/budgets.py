"""How many synthetic images each class gets. Pure.

The same number for each by default; a long tail is filled up, not multiplied (as Fill-Up does, Shin et
al. 2023); and a user may give a class more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ray_synth.config import PromptingConfig
from ray_synth.errors import UserError, did_you_mean


def class_budgets(prompting: PromptingConfig, counts: Mapping[str, int]) -> np.ndarray | None:
    """Synthetic images of each class, (num_classes,) int64, in the order of `counts`.

    None where each gets the same share of what the multiplier gives.

    Args:
        counts: real training images by class name.

    Raises:
        UserError: `class_multipliers` names an unknown class, or nothing is left to make.
    """
    real = np.array(list(counts.values()), np.int64)
    if isinstance(prompting.fill_to, int):
        found = np.maximum(prompting.fill_to - real, 0)
    elif prompting.fill_to == "even":
        found = filled_up(real, planned(prompting.multiplier, int(real.sum())))
    elif prompting.class_multipliers:
        found = _multiplied(prompting, counts, real)
    else:
        return None
    if not found.sum():
        setting = f"fill_to {prompting.fill_to}" if prompting.fill_to else "class_multipliers"
        raise UserError(
            f"prompting.{setting} leaves no image to make: every class has as many real ones "
            f"(the smallest {real.min()}); raise it"
        )
    return found


def planned(multiplier: float, real: int) -> int:
    """Synthetic images of all classes, by the multiplier."""
    return max(1, round(multiplier * real))


def even_shares(classes: int, total: int) -> np.ndarray:
    """The same for each; the first classes have one more where it does not divide."""
    return total // classes + (np.arange(classes) < total % classes)


def filled_up(real: np.ndarray, total: int) -> np.ndarray:
    """`total` images dealt so that real and synthetic together are as even as they can be.

    Args:
        real: (num_classes,) real images.

    Returns:
        (num_classes,) int64; classes above the common level get none.
    """
    order = np.argsort(real, kind="stable")
    ordered = real[order]
    # what it takes to lift the k smallest to the level of the k-th
    needed = np.arange(1, len(real) + 1) * ordered - np.cumsum(ordered)
    lifted = int(np.searchsorted(needed, total, side="right"))
    level, rest = divmod(int(ordered[:lifted].sum()) + total, lifted)
    found = np.zeros(len(real), np.int64)
    found[order[:lifted]] = level - ordered[:lifted] + (np.arange(lifted) < rest)
    return found


def within(budgets: np.ndarray | None, total: int, there: Sequence[int]) -> np.ndarray:
    """Budgets (None: an even share of `total` for each) of at most what there is of each class."""
    wanted = even_shares(len(there), total) if budgets is None else budgets
    return np.minimum(wanted, there)


def _multiplied(
    prompting: PromptingConfig, counts: Mapping[str, int], real: np.ndarray
) -> np.ndarray:
    """Named classes by their own multipliers; the others share evenly what the general one gives."""
    named = prompting.class_multipliers
    for name in named:
        if name not in counts:
            raise UserError(
                f"prompting.class_multipliers has {name!r}, which is no class; "
                f"{did_you_mean(name, list(counts), known_as='classes')}"
            )
    own = np.array([named.get(name, np.nan) for name in counts])
    others = np.isnan(own)
    found = np.round(np.where(others, 0, own) * real).astype(np.int64)
    if others.any():
        total = planned(prompting.multiplier, int(real[others].sum()))
        found[others] = even_shares(int(others.sum()), total)
    return found
