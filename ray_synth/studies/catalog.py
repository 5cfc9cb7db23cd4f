"""All studies, by name. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ray_synth.config import Config
from ray_synth.errors import UserError, did_you_mean
from ray_synth.studies.amounts import low_data, practice, scaling
from ray_synth.studies.arm import REAL_ONLY
from ray_synth.studies.design import Study
from ray_synth.studies.makers import generators, llms, rivals
from ray_synth.studies.parts import ablation, mix, quality
from ray_synth.studies.shifts import diversity, domain_shift, robustness


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


WRITERS: dict[str, Callable[[Config, dict[str, int]], Study]] = {
    "ablation": ablation,
    "scaling": scaling,
    "low_data": low_data,
    "mix": mix,
    "llms": llms,
    "generators": generators,
    "quality": quality,
    "domain_shift": domain_shift,
    "diversity": diversity,
    "robustness": robustness,
    "practice": practice,
    "rivals": rivals,
}
