"""Studies of how many images: synthetic ones, real ones, and which are made next. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray_synth.config import Config, PracticeConfig, PracticeSelectConfig
from ray_synth.studies.arm import Arm
from ray_synth.studies.design import REAL, SHARED, Study

IMBALANCE = 20.0  # largest over smallest class of the long-tailed sets
ROUNDS = 4  # of practice, where the config does not say


def scaling(config: Config, counts: dict[str, int]) -> Study:
    """More and more synthetic images of one plan, with shared and dual BN."""
    arms = [REAL]
    for scale in sorted(config.studies.scales):
        for line, settings in (("dual BN", {}), ("shared BN", SHARED)):
            name = f"{line.split()[0]}_{scale:g}x"
            arms.append(Arm(name, f"{line}, {scale:g}x", scale, settings, line=line, x=scale))
    return Study(
        "scaling",
        "More synthetic images",
        "The same real images with 1x to 24x as many synthetic ones, each a prefix of the next: where "
        "do gains stop?",
        tuple(arms),
        bns=("main", "aux", "average"),
        plot="lines",
        x_label="synthetic images per real one",
        log_x=True,
        measures=("saturation",),
    )


def low_data(config: Config, counts: dict[str, int]) -> Study:
    """Fewer and fewer real images, and long-tailed sets."""
    arms = []
    numbers = sorted(n for n in set(config.studies.images_per_class) if n <= max(counts.values()))
    for number in numbers or [max(counts.values())]:
        few = {"data.train.images_per_class": number}
        real = f"real_{number}"
        arms += [
            Arm(real, f"{number} per class, real only", 0, few, real, "real only", number),
            Arm(f"whole_{number}", f"{number} per class, + synthetic", config.studies.scale, few,
                real, "real + synthetic", number),
        ]  # fmt: skip
    tail = {"data.train.images_per_class": long_tail(counts, config)}
    even = {**tail, "training.class_balance": 1.0}
    scale = config.studies.scale
    arms += [
        Arm("tail_real", "long tail, real only", 0, tail, "tail_real"),
        Arm("tail_even", "long tail, real only, classes balanced", 0, even, "tail_real"),
        Arm("tail_whole", "long tail, + synthetic", scale, tail, "tail_real"),
        Arm(
            "tail_whole_even", "long tail, + synthetic, classes balanced", scale, even, "tail_real"
        ),
        Arm(
            "tail_filled",
            "long tail, filled up",
            scale,
            {**tail, "prompting.fill_to": "even"},
            "tail_real",
        ),
        Arm(
            "tail_filled_even",
            "long tail, filled up, classes balanced",
            scale,
            {**even, "prompting.fill_to": "even"},
            "tail_real",
        ),
    ]
    return Study(
        "low_data",
        "Few images, and long tails",
        "Does it help more where there are fewer real images, and for rare classes?",
        tuple(arms),
        plot="lines",
        x_label="real images per class",
        log_x=True,
        measures=("by_frequency",),
    )


def long_tail(counts: dict[str, int], config: Config) -> dict[str, int]:
    """Images by class name, falling exponentially from the most that `images_per_class` has to
    that over `IMBALANCE`, in the order of the classes (as CIFAR-LT: Cui et al., 2019)."""
    most = min(max(config.studies.images_per_class), max(counts.values()))
    steps = max(len(counts) - 1, 1)
    return {
        name: min(count, max(1, round(most * IMBALANCE ** (-at / steps))))
        for at, (name, count) in enumerate(counts.items())
    }


def practice(config: Config, counts: dict[str, int]) -> Study:
    """A fixed plan against rounds, of as many images; on the classes as they are, and on a long tail.

    Arms whose rounds would have fewer images than there are classes are left out.
    """
    scale = config.studies.scale
    rounds = config.prompting.practice or PracticeConfig(rounds=ROUNDS)
    without = {"stop": None, "guidance": None, "select": None}
    given = rounds.model_copy(update=without).model_dump()
    tail = {"data.train.images_per_class": long_tail(counts, config)}

    def practised(**changes: Any) -> dict[str, Any]:
        return {"prompting.practice": {**given, **changes}}

    first = rounds.first or 1 / rounds.rounds
    smallest = min(first, (1 - first) / (rounds.rounds - 1))  # share of a round
    alone = {"by_class": False, "by_kind": False, "apart": None, "contexts": False}

    def fits(arm: Arm) -> bool:
        images = int(arm.scale * _trained_on(arm, config, counts) * smallest)
        return "prompting.practice" not in arm.settings or images >= len(counts)

    arms = (
        REAL,
        Arm("fixed", "fixed plan", scale),
        Arm("rounds_alone", "rounds, steered by nothing", scale, practised(**alone), "fixed"),
        Arm("rounds", "rounds", scale, practised(), "fixed"),
        Arm("by_class", "rounds, by class alone", scale,
            practised(**{**alone, "by_class": True}), "fixed"),
        *_steered(config, rounds, practised),
        Arm("rounds_third", "rounds, a third of the images", scale / 3, practised(), "fixed"),
        Arm("tail_real", "long tail, real only", 0, tail, "tail_real"),
        Arm("tail_fixed", "long tail, fixed plan", scale, tail, "tail_real"),
        Arm("tail_filled", "long tail, filled up", scale,
            {**tail, "prompting.fill_to": "even"}, "tail_fixed"),
        Arm("tail_rounds", "long tail, rounds", scale, {**tail, **practised()}, "tail_fixed"),
    )  # fmt: skip
    return Study(
        "practice",
        "Rounds that are made for what the model does not know",
        "A plan that is fixed before training begins against rounds that the model in training steers, "
        "with as many images: is it better, and does a third of the images do as well?",
        tuple(arm for arm in arms if fits(arm)),
        measures=("by_frequency",),
    )


def _steered(
    config: Config, rounds: PracticeConfig, practised: Callable[..., dict[str, Any]]
) -> list[Arm]:
    """Arms in which the learner chooses among candidates, or guides the sampler where the config has it
    do so."""
    scale, checks, found = config.studies.scale, config.generation.checks, []
    if checks.label and checks.policy != "off":
        select = rounds.select or PracticeSelectConfig(factor=2)
        label = f"rounds, the hardest of {select.factor} kept"
        settings = practised(select=select.model_dump())
        found.append(Arm("select", label, scale, settings, "rounds"))
    if rounds.guidance:
        settings = practised(guidance=rounds.guidance.model_dump())
        found.append(Arm("guided", "rounds, guided", scale, settings, "rounds"))
    return found


def _trained_on(arm: Arm, config: Config, counts: dict[str, int]) -> int:
    """Real images that an arm trains on."""
    own = "data.train.images_per_class"
    given = arm.settings.get(own, config.data.train.images_per_class)
    if isinstance(given, int):
        given = dict.fromkeys(counts, given)
    return sum(min(count, (given or {}).get(name, count)) for name, count in counts.items())
