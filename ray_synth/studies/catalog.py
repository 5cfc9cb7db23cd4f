"""The studies: their questions and their arms. Pure.

"The whole" is the method as the config has it: label ambiguity resolution, the config's mix of prompts,
dual BN, balanced batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ray_synth.config import Config, PracticeConfig, PracticeSelectConfig
from ray_synth.errors import UserError, did_you_mean
from ray_synth.generators.registry import filled
from ray_synth.studies.arm import REAL_ONLY, Arm

IMBALANCE = 20.0  # largest over smallest class of the long-tailed sets
ROUNDS = 4  # of practice, where the config does not say
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


def studies(config: Config, counts: dict[str, int]) -> dict[str, Study]:
    """All studies of a config, by name, in the order in which the report tells them.

    Args:
        counts: real images of each class that there are to train on, by class name.
    """
    baseline = "recipe" if config.training.baseline == "recipe" else REAL_ONLY
    found = {name: write(config, counts) for name, write in WRITERS.items()}
    return {name: replace(study, baseline=baseline) for name, study in found.items()}


def known_name(name: str) -> str:
    """The name of a study, or `all`, however its words are joined.

    Raises:
        UserError: there is no study of this name.
    """
    known = name.lower().replace("-", "_")
    if known == "all" or known in WRITERS:
        return known
    hint = did_you_mean(known, [*WRITERS, "all"], known_as="studies")
    raise UserError(f"no study is called {name!r}; {hint}")


def seeds_of(config: Config, name: str) -> list[int]:
    """The seeds of a study.

    Raises:
        UserError: `studies.more_seeds` has a study that there is not.
    """
    if "all" in config.studies.more_seeds:
        raise UserError("studies.more_seeds: all: is no study; studies.seeds is for all of them")
    more = {known_name(study): count for study, count in config.studies.more_seeds.items()}
    return [*range(more[name])] if name in more else config.studies.seeds


def _ablation(config: Config, counts: dict[str, int]) -> Study:
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


def _scaling(config: Config, counts: dict[str, int]) -> Study:
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


def _low_data(config: Config, counts: dict[str, int]) -> Study:
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


def _mix(config: Config, counts: dict[str, int]) -> Study:
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


def _llms(config: Config, counts: dict[str, int]) -> Study:
    scale = config.studies.scale
    arms = [REAL, Arm("whole", "the config's own", scale)]
    for name, settings in (config.studies.llms or _other_style(config)).items():
        dotted = {f"meaning.llm.{key}": value for key, value in settings.items()}
        arms.append(Arm(f"llm_{name}", name, scale, dotted, "whole"))
    return Study(
        "llms",
        "Another language model",
        "The same classes and seeds through several language models: do they mean the same, are their "
        "prompts as diverse, does accuracy change?",
        tuple(arms),
        measures=("meanings", "prompts"),
    )


def _other_style(config: Config) -> dict[str, dict[str, Any]]:
    """The config's own language model, asked in the other way."""
    if config.meaning.llm.style == "chat":
        return {"the same, asked to complete": {"style": "completion"}}
    return {"the same, asked as a chat": {"style": "chat"}}


def _other_steps(config: Config) -> dict[str, dict[str, Any]]:
    """The config's own generator with fewer and more steps, and with stronger guidance."""
    generation = filled(config.generation)
    steps, scale = generation.num_inference_steps, generation.guidance_scale
    assert steps is not None
    assert scale is not None
    more = {
        f"{number} step{'s' * (number > 1)}": {"num_inference_steps": number}
        for number in (max(1, steps // 4), 2 * steps)
        if number != steps
    }
    stronger = 2.0 if scale <= 1 else 2 * scale
    return {**more, f"guidance {stronger:g}": {"guidance_scale": stronger}}


def _generators(config: Config, counts: dict[str, int]) -> Study:
    scale = config.studies.scale
    arms = [REAL, Arm("whole", "the config's own", scale)]
    for name, settings in (config.studies.generators or _other_steps(config)).items():
        dotted = {f"generation.{key}": value for key, value in settings.items()}
        arms.append(Arm(f"generator_{name}", name, scale, dotted, "whole"))
    return Study(
        "generators",
        "Another generator",
        "Few steps against many, guidance scales, other models: accuracy, diversity, distance from the "
        "real images, and what a gained point costs.",
        tuple(arms),
        measures=("generation", "diversity", "distance"),
    )


def _quality(config: Config, counts: dict[str, int]) -> Study:
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


def _domain_shift(config: Config, counts: dict[str, int]) -> Study:
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


def _diversity(config: Config, counts: dict[str, int]) -> Study:
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


def _robustness(config: Config, counts: dict[str, int]) -> Study:
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


def _practice(config: Config, counts: dict[str, int]) -> Study:
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


def _rivals(config: Config, counts: dict[str, int]) -> Study:
    scale = config.studies.scale
    arms = [
        REAL,
        Arm("whole", "the recipe", scale),
        Arm("tuned", "the same plan, generator tuned", scale, against="whole", rival="tuned"),
    ]
    if config.studies.pool:
        arms.append(
            Arm("retrieved", "retrieved real images", scale, against="whole", rival="retrieved")
        )
    return Study(
        "rivals",
        "Diversify, or fine-tune, or retrieve",
        "The same number of images by the recipe, by the same plan with the generator tuned on the real "
        "images (LoRA), and, of a pool, real images retrieved by CLIP: which helps most?",
        tuple(arms),
        measures=("generation", "diversity", "distance"),
    )


WRITERS: dict[str, Callable[[Config, dict[str, int]], Study]] = {
    "ablation": _ablation,
    "scaling": _scaling,
    "low_data": _low_data,
    "mix": _mix,
    "llms": _llms,
    "generators": _generators,
    "quality": _quality,
    "domain_shift": _domain_shift,
    "diversity": _diversity,
    "robustness": _robustness,
    "practice": _practice,
    "rivals": _rivals,
}
