"""What each study of a config would take, by arithmetic alone; see preflight/outlook.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray_synth.config import Config
from ray_synth.preflight.demands import Sizes
from ray_synth.preflight.outlook import PEAK, gpu_of, images_per_second, outlook
from ray_synth.studies.arm import Arm
from ray_synth.studies.catalog import seeds_of, studies
from ray_synth.studies.design import Study


@dataclass(frozen=True)
class StudyCost:
    """What a study would take by itself; studies share trainings and images where they are the same.
    Tuning a generator and looking through a pool are not in it.

    Attributes:
        trainings: arms times seeds.
        images: synthetic ones to make, over all seeds.
    """

    name: str
    trainings: int
    images: int
    gpu_hours: float


def study_costs(config: Config, sizes: Sizes, gpu: str | None = None) -> list[StudyCost]:
    """Of every study of the config. Raises UserError as `outlook`."""
    assert sizes.real is not None and sizes.classes is not None
    gpu = gpu or gpu_of(config)
    each = max(1, sizes.real // sizes.classes)
    counts = {f"class {at}": each for at in range(sizes.classes)}
    return [_cost(config, study, sizes, gpu) for study in studies(config, counts).values()]


def _cost(config: Config, study: Study, sizes: Sizes, gpu: str | None) -> StudyCost:
    seeds = len(seeds_of(config, study.name))
    hours = {part.what: part.gpu_hours for part in _of(config, sizes, gpu).parts}
    alone = hours.get("training real_only", hours["training mixed"] / 2)
    made: dict[Any, float] = {}
    trained = 0.0
    for arm in study.arms:
        share = _real(arm, sizes) / (sizes.real or 1)
        trained += share * (hours["training mixed"] if arm.scale else alone)
        if arm.scale and arm.rival != "retrieved":
            settings = {"rival": arm.rival, **arm.settings}
            key = tuple(
                sorted((k, str(v)) for k, v in settings.items() if not k.startswith("training."))
            )
            made[key] = max(made.get(key, 0.0), arm.scale * _real(arm, sizes))
    images = round(sum(made.values()))
    rate = images_per_second(config, PEAK[gpu or ""])
    return StudyCost(
        study.name,
        len(study.arms) * seeds,
        images * seeds,
        seeds * (trained + images / rate / 3600),
    )


def _of(config: Config, sizes: Sizes, gpu: str | None) -> Any:
    training = config.training.model_copy(update={"baseline": "matched"})
    return outlook(config.model_copy(update={"training": training}), sizes, gpu)


def _real(arm: Arm, sizes: Sizes) -> int:
    """Real images that an arm trains on."""
    assert sizes.real is not None and sizes.classes is not None
    few = arm.settings.get("data.train.images_per_class")
    if few is None:
        return sizes.real
    return sum(few.values()) if isinstance(few, dict) else min(sizes.real, few * sizes.classes)


def lines(costs: list[StudyCost], price: float) -> list[str]:
    """A table for people, one row per study."""
    rows = [f"{'study':<16}{'trainings':>10}{'images':>14}{'GPU-hours':>12}{'cost':>12}"]
    for cost in costs:
        money = f"${cost.gpu_hours * price:,.0f}" if price else ""
        rows.append(
            f"{cost.name:<16}{cost.trainings:>10}{cost.images:>14,}{cost.gpu_hours:>12,.0f}{money:>12}"
        )
    return rows
