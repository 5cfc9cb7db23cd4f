"""Studies of the method's parts: what each adds, how batches are mixed, which images count. Pure."""

from __future__ import annotations

from typing import Any

from ray_synth.config import Config
from ray_synth.studies.arm import REAL_ONLY, Arm
from ray_synth.studies.design import NO_LAR, PLAIN, REAL, SHARED, Study


def ablation(config: Config, counts: dict[str, int]) -> Study:
    """Built up part by part from plain prompts, and each part left out of the whole."""
    scale = config.studies.scale
    kinds = {str(kind): share for kind, share in config.prompting.mix.items() if share}
    photos = {kind: share for kind, share in kinds.items() if kind != "stylized"} or PLAIN
    flat = {kind: share for kind, share in kinds.items() if kind != "contextual"} or PLAIN
    no_balance = _unbalanced(config, scale)
    no_cd = {"prompting.mix": flat, "prompting.contexts_per_class": 0}
    no_sd = {"prompting.mix": photos}
    plain = {"prompting.mix": PLAIN, **SHARED, **no_balance}

    def arm(name: str, label: str, settings: dict[str, Any], against: str) -> Arm:
        return Arm(name, label, scale, settings, against)

    return Study(
        "ablation",
        "What each part adds",
        "Built up part by part from plain prompts, and each part left out of the whole: which parts "
        "does the gain come from?",
        (
            REAL,
            arm("plain", "plain prompts", {**plain, **NO_LAR}, REAL_ONLY),
            arm("lar", "+ meanings (LAR)", plain, "plain"),
            arm("cd", "+ contexts (CD)", {**no_sd, **SHARED, **no_balance}, "lar"),
            arm("sd", "+ styles (SD)", {**SHARED, **no_balance}, "cd"),
            arm("aux_bn", "+ auxiliary BN", no_balance, "sd"),
            arm("whole", "+ balanced batches: the whole", {}, "aux_bn"),
            arm("no_balance", "whole without balanced batches", no_balance, "whole"),
            arm("no_lar", "whole without LAR", NO_LAR, "whole"),
            arm("no_cd", "whole without CD", no_cd, "whole"),
            arm("no_sd", "whole without SD", no_sd, "whole"),
            arm("no_aux_bn", "whole without auxiliary BN", SHARED, "whole"),
            arm("label_check", "whole with the label check, made again",
                _checks("retry", clip=False, label=True), "whole"),
        ),
    )  # fmt: skip


def _checks(policy: str, *, clip: bool, label: bool) -> dict[str, Any]:
    given = {"policy": policy, "clip": clip, "label": label}
    return {f"generation.checks.{name}": value for name, value in given.items()}


def _unbalanced(config: Config, scale: float) -> dict[str, Any]:
    """Batches as the two sets poured together would give them: every image counts the same.

    The number of real images in a batch stays, and with it the number seen.
    """
    real = config.training.num_real
    batch = real + max(1, round(real * scale))
    return {
        "training.batch_size": batch,
        "training.real_fraction": real / batch,
        "training.lambda_synth": scale,
        "training.lambda_end": None,
    }


def mix(config: Config, counts: dict[str, int]) -> Study:
    """λ, and the share of real images in a batch."""
    training, scale = config.training, config.studies.scale
    arms = [REAL, Arm("whole", "the config's own", scale)]
    for weight in config.studies.lambdas:
        if weight != training.lambda_synth:
            settings = {"training.lambda_synth": weight, "training.lambda_end": None}
            arms.append(Arm(f"lambda_{weight:g}", f"λ = {weight:g}", scale, settings, "whole"))
    for fraction in config.studies.real_fractions:
        batch = round(training.num_real / fraction)
        if batch != training.batch_size and batch > training.num_real:
            settings = {
                "training.batch_size": batch,
                "training.real_fraction": training.num_real / batch,
            }
            label = f"{fraction:.0%} of a batch real"
            arms.append(Arm(f"real_{fraction:g}", label, scale, settings, "whole"))
    return Study(
        "mix",
        "λ and the mix of a batch",
        "How much should synthetic images weigh, and how many should a batch have? Chosen on the "
        "validation images, told on the test set.",
        tuple(arms),
        bns=("main",),
        selects=True,
    )


def quality(config: Config, counts: dict[str, int]) -> Study:
    """The same number of accepted images by `retry`; fewer at the cost of the plain ones by `reject`."""
    scale = config.studies.scale
    off = {"generation.checks.policy": "off"}

    return Study(
        "quality",
        "Which images are trained on",
        "Images that fail a check are made again with new seeds, or left out: is it worth it?",
        (
            REAL,
            Arm("unchecked", "all images", scale, off),
            Arm("scores", "thresholds, made again", scale,
                _checks("retry", clip=True, label=False), "unchecked"),
            Arm("labels", "label check, made again", scale,
                _checks("retry", clip=False, label=True), "unchecked"),
            Arm("both", "both, made again", scale,
                _checks("retry", clip=True, label=True), "unchecked"),
            Arm("both_rejected", "both, left out", scale,
                _checks("reject", clip=True, label=True), "unchecked"),
        ),
        measures=("generation",),
    )  # fmt: skip
