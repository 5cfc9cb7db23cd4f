"""What a study is: a question, and the arms that are trained to answer it. Pure.

"The whole" is the method as the config has it: label ambiguity resolution, the config's mix of prompts,
dual BN, balanced batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray_synth.studies.arm import REAL_ONLY, Arm

PLAIN = {"plain": 1.0}
NO_LAR = {"meaning.enabled": False}
SHARED = {"training.dual_bn": False}
REAL = Arm(REAL_ONLY, "real only")


@dataclass(frozen=True)
class Study:
    """One question, and what is trained to answer it.

    Attributes:
        bns: exports of dual-BN models that are tested.
        plot: bars of gains by arm, or lines over `Arm.x`.
        selects: choose among the arms on the validation images.
        measures: what is measured beside accuracy; see measures.py.
        baseline: how its arm of real images alone is trained: real_only (matched) or recipe.
    """

    name: str
    title: str
    question: str
    arms: tuple[Arm, ...]
    bns: tuple[str, ...] = ("main", "average")
    plot: Literal["bars", "lines"] = "bars"
    x_label: str = ""
    log_x: bool = False
    selects: bool = False
    measures: tuple[str, ...] = ()
    baseline: str = REAL_ONLY
