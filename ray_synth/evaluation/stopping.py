"""When more images are no longer worth making: a rule on what rounds gain on validation images. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_synth.evaluation.accuracy import paired_gain

IN_A_ROW = 2


def gains(rights: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """What each round gained over the one before, in points, paired image by image (`paired_gain`).

    Args:
        rights: by round, (images,) bool, which of the same images the learner had right.
    """
    return [
        paired_gain(int((after & ~before).sum()), int((before & ~after).sum()), len(after))
        for before, after in itertools.pairwise(rights)
    ]


def enough(rights: Sequence[np.ndarray], least: float) -> bool:
    """Whether the newest `IN_A_ROW` rounds each gained, as validation shows, less than `least` points.

    A round that may have gained as much is not one of them: the upper end of the gain's 95% interval has
    to be below `least`. A round that does gain `least` is taken for one that does not in 2.5% of cases,
    two in a row more rarely still; and few validation images hardly ever end a run.
    """
    found = gains(rights[-IN_A_ROW - 1 :])
    return len(found) == IN_A_ROW and all(gain["interval"][1] < least for gain in found)
