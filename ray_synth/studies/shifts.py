"""Studies of how images differ: synthetic from real ones, from each other, and test sets. Pure."""

from __future__ import annotations

from ray_synth.config import Config
from ray_synth.studies.arm import Arm
from ray_synth.studies.design import REAL, SHARED, Study


def domain_shift(config: Config, counts: dict[str, int]) -> Study:
    """How far synthetic images are from real ones, by layer and in CLIP's features."""
    scale = config.studies.scale
    return Study(
        "domain_shift",
        "How far synthetic images are from real ones",
        "In the layers' statistics, before and after they have BN of their own, and in CLIP's "
        "features; and does that distance explain the gain?",
        (
            REAL,
            Arm("no_aux_bn", "shared BN", scale, SHARED),
            Arm("whole", "dual BN", scale),
            *_kinds(config),
        ),
        bns=("main", "aux", "average"),
        measures=("distance", "layers"),
    )


def diversity(config: Config, counts: dict[str, int]) -> Study:
    """How different images are, by kind of prompt."""
    return Study(
        "diversity",
        "How different the images are",
        "Per class and kind of prompt: distances, Vendi score, coverage of the real images, copies; "
        "and does diversity explain the gain?",
        (REAL, Arm("whole", "the config's mix", config.studies.scale), *_kinds(config)),
        bns=("main",),
        measures=("diversity", "prompts"),
    )


def _kinds(config: Config) -> list[Arm]:
    """Each kind of prompt alone."""
    scale = config.studies.scale
    return [
        Arm(f"kind_{kind}", f"{kind} prompts alone", scale, {"prompting.mix": {kind: 1.0}}, "whole")
        for kind in ("plain", "contextual", "stylized")
    ]


def robustness(config: Config, counts: dict[str, int]) -> Study:
    """Test sets that are corrupted more and more."""
    scale = config.studies.scale
    return Study(
        "robustness",
        "Test sets that drift",
        "The same models on the test set as it is corrupted more and more, and on every out-of-domain "
        "set of the config: does the gain last?",
        (REAL, Arm("no_aux_bn", "shared BN", scale, SHARED), Arm("whole", "dual BN", scale)),
        plot="lines",
        x_label="severity of corruption",
        measures=("corruptions",),
    )
