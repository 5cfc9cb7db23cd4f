"""An arm of a study, and the trials it is made of: one per seed. Pure, but for the generator's name.

A trial is known by a digest of all that decides its result. Trials with the same digest, in any study,
are trained once; sources (real images, meanings, plan, synthetic images) of one digest are made once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from ray_synth.config import Config, GenerationConfig, parse_config
from ray_synth.generators.registry import filled, fingerprint
from ray_synth.stages import stage_inputs
from ray_synth.training.published import recipe_alone

REAL_ONLY = "real_only"
STUDIES = "studies"  # the folder of all studies in a run's
VALIDATION_PER_CLASS = 20  # held out, where `data.validation` does not say
PRACTICE = "prompting.practice"
ARMS = "arms"  # the folder of all trained models of a config's studies


@dataclass(frozen=True)
class Arm:
    """One way of training, as a study varies it.

    Attributes:
        name: unique in its study.
        label: for people.
        scale: synthetic images per real one; 0: real images alone.
        settings: what differs from the config, by dotted key.
        against: the arm that this one's change is measured against.
        line, x: where the study's plot is of lines: which line, and at which place on its axis.
        rival: what is made of its real images before it: an adapter (tuned), or a set of other real
            images (retrieved); see rivals.py.
        by_seed: the settings that follow from that.
    """

    name: str
    label: str
    scale: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    against: str = REAL_ONLY
    line: str = ""
    x: float | None = None
    rival: Literal["", "tuned", "retrieved"] = ""
    by_seed: dict[int, dict[str, Any]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Trial:
    """An arm with one seed.

    Attributes:
        config: of its source's run; the name is the source's digest.
        digest: of all that decides the trained model.
    """

    arm: Arm
    seed: int
    config: Config
    digest: str

    @property
    def source(self) -> str:
        return self.config.name

    @property
    def mixed(self) -> bool:
        return self.arm.scale > 0


def trials_of(
    base: Config, arms: Iterable[Arm], seeds: Iterable[int], *, everything: Iterable[Arm] = ()
) -> list[Trial]:
    """A trial for each arm and seed.

    Args:
        everything: all arms of all studies. Arms whose images differ in number alone take them from
            one plan, of which each is a prefix: its length is the longest that any of these needs. Of
            rounds none is a prefix of longer ones: each number has a plan of its own.

    Raises:
        ValueError: an arm's settings are not valid.
    """
    arms = list(arms)
    longest: dict[str, float] = {}
    for arm in (*everything, *arms):
        key = _images_key(_configured(base, arm, 0))
        longest[key] = max(longest.get(key, 0.0), arm.scale)
    found = []
    for arm in arms:
        key = _images_key(_configured(base, arm, 0))
        for seed in seeds:
            own = arm.rival or PRACTICE in arm.settings  # no prefix of another arm's plan
            scale = arm.scale if own else longest[key]
            config = _configured(base, arm, seed, multiplier=scale or None)
            found.append(_trial(arm, seed, config))
    return found


def _trial(arm: Arm, seed: int, config: Config) -> Trial:
    inputs = stage_inputs(config, _fingerprint(config.generation.model_dump_json()))
    if arm.scale:
        # The later rounds of practice follow from the training.
        decides = "training" if config.prompting.practice else "generation"
        source = _digest(inputs[decides])
        digest = _digest({**inputs["training"], "scale": float(arm.scale)})  # 6 is 6.0
    else:  # nothing that concerns synthetic images makes a difference
        source = _digest(inputs["data"])
        training = {k: v for k, v in inputs["training"].items() if k.startswith("training.")}
        digest = _digest({**inputs["data"], **training, "scale": 0})
    return Trial(arm, seed, config.model_copy(update={"name": source}), digest)


def _configured(base: Config, arm: Arm, seed: int, multiplier: float | None = None) -> Config:
    values = base.model_dump()
    values["prompting"]["practice"] = None  # plans are fixed, but for arms that say otherwise
    for key, value in {**arm.settings, **arm.by_seed.get(seed, {})}.items():
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    values["seed"] = seed
    values["tracking"]["enabled"] = False  # the study has runs of its own
    values["training"]["feed"] = "stored"  # a seed decides the result, and no clock
    values["data"]["validation"] = base.data.validation or VALIDATION_PER_CLASS
    values["studies"] = base.studies.model_validate({})  # of no concern to a run
    values["tuning"] = base.tuning.model_validate({})
    if multiplier:
        values["prompting"]["multiplier"] = multiplier
    baseline = base.training.baseline
    values["training"]["baseline"] = "matched"  # of one arm there is none
    config = parse_config(values, origin=f"arm {arm.name}")
    config = config.model_copy(update={"generation": filled(config.generation)})
    if arm.scale:
        return config
    training = config.training
    if baseline == "recipe":
        return config.model_copy(update={"training": recipe_alone(training)})
    alone = {
        "dual_bn": False, "dual_layer_norm": False, "lambda_synth": 1.0, "lambda_end": None,
        "real_fraction": 0.5, "batch_size": 2 * training.num_real,
    }  # fmt: skip
    return config.model_copy(update={"training": training.model_copy(update=alone)})


def _images_key(config: Config) -> str:
    """A digest of all that decides the images, their number apart."""
    inputs = stage_inputs(config, _fingerprint(config.generation.model_dump_json()))["generation"]
    return _digest({k: v for k, v in inputs.items() if k != "prompting.multiplier"})


@lru_cache(maxsize=256)
def _fingerprint(generation: str) -> str:
    return fingerprint(GenerationConfig.model_validate_json(generation))


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
