"""The preflight: every stage's demands against the cluster's reach, and a refusal with the arithmetic.

A Ray pipeline that lacks a CPU or a GPU does not fail, it waits in silence. So a run that cannot fit is
refused before anything starts, with the smallest change that fits.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ray_synth.cluster.connection import runs_folder
from ray_synth.config import Config
from ray_synth.errors import UserError
from ray_synth.preflight.demands import Sizes, demands, shared_training_gpu
from ray_synth.preflight.packing import Demand, Placement, pack
from ray_synth.preflight.reach import Reach, cluster_reach
from ray_synth.stages import STAGES

log = logging.getLogger("ray_synth")
PATIENCE_S = 20.0  # what an earlier run held is released within seconds of its end


@dataclass(frozen=True)
class StageFit:
    """One stage's verdict.

    Attributes:
        placement: None where it does not fit.
        problem: why, with the arithmetic; "" where it fits.
    """

    stage: str
    demands: tuple[Demand, ...]
    placement: Placement | None
    problem: str

    @property
    def cpus(self) -> float:
        return sum(d.count * d.cpus for d in self.demands)

    @property
    def gpus(self) -> float:
        return sum(d.count * d.gpus for d in self.demands)


def fit_stages(
    config: Config,
    reach: Reach,
    sizes: Sizes | None = None,
    stages: Collection[str] = STAGES,
) -> list[StageFit]:
    """Each stage that asks for something, in order."""
    wanted = {stage: d for stage, d in demands(config, sizes).items() if stage in stages and d}
    found = [fit(stage, parts, reach) for stage, parts in wanted.items()]
    shared = shared_training_gpu(config)
    return [
        replace(one, placement=None, problem=shared) if shared and one.stage == "training" else one
        for one in found
    ]


def fit(stage: str, parts: Sequence[Demand], reach: Reach) -> StageFit:
    """Whether units can all be at work at once."""
    placement = pack(parts, reach.nodes, reach.most_added)
    problem = "" if placement else _explain(stage, parts, reach)
    return StageFit(stage, tuple(parts), placement, problem)


def _explain(stage: str, parts: Sequence[Demand], reach: Reach) -> str:
    """The sum that is too large; or the unit that no node holds; or that they cannot be shared out."""
    for name, attribute, held in (
        ("CPUs", "cpus", reach.held_cpus),
        ("GPUs", "gpus", reach.held_gpus),
    ):
        cap = getattr(reach, attribute)
        need = sum(part.count * getattr(part, attribute) for part in parts)
        if need > cap + 1e-9:
            return (
                f"{stage} needs {need:g} {name} ({_terms(parts, attribute)}), the cluster reaches "
                f"{cap:g}{_held(held, name, reach)}: {need - cap:g} too few"
            )
    for part in parts:
        if part.gpus > 1 and part.gpus != int(part.gpus):
            return (
                f"{stage}: {part.what} asks for {part.gpus:g} GPUs each; Ray gives a fraction of one "
                "GPU, or a whole number of them"
            )
        if pack([replace(part, count=1)], reach.nodes, reach.most_added) is None:
            asked = f"{part.cpus:g} CPUs" + (f" and {part.gpus:g} GPUs" if part.gpus else "")
            return f"{stage}: {part.what} asks for {asked} on one node, {_largest(part, reach)}"
    return (
        f"{stage} needs {' + '.join(map(_units, parts))}, each on one node"
        f"{', fractions of a GPU on one GPU' if any(0 < p.gpus < 1 for p in parts) else ''}; "
        f"they cannot be shared out over {reach.describe()}"
        + "".join(
            _held(held, name, reach)
            for held, name in ((reach.held_cpus, "CPUs"), (reach.held_gpus, "GPUs"))
        )
    )


def _terms(parts: Sequence[Demand], attribute: str) -> str:
    sizes = [(part, getattr(part, attribute)) for part in parts]
    return " + ".join(f"{part.what} {part.count} x {size:g}" for part, size in sizes if size)


def _units(part: Demand) -> str:
    gpus = f" and {part.gpus:g} GPUs" if part.gpus else ""
    return f"{part.what} {part.count} x ({part.cpus:g} CPUs{gpus})"


def _held(held: float, name: str, reach: Reach) -> str:
    if not held:
        return ""
    who = ", ".join(reach.holders) or "other jobs or actors"
    return f" ({held:g} more {name} are held by {who})"


def _largest(part: Demand, reach: Reach) -> str:
    alone = "the largest has"
    if not part.gpus or all(node.gpus < part.gpus for node in reach.nodes):
        name, attribute = ("GPUs", "gpus") if part.gpus else ("CPUs", "cpus")
        return f"{alone} {max((getattr(n, attribute) for n in reach.nodes), default=0):g} {name}"
    cpus = max(node.cpus for node in reach.nodes if node.gpus >= part.gpus)
    return f"{alone} {cpus:g} CPUs beside so many GPUs"


def check_budget(
    config: Config,
    reach: Reach,
    sizes: Sizes | None = None,
    stages: Collection[str] = STAGES,
) -> list[StageFit]:
    """Raises UserError, with the arithmetic and the smallest fix, where a stage cannot fit.

    Returns:
        The stages, all of which fit. Those that an unlucky placement could leave waiting are logged.
    """
    fits = fit_stages(config, reach, sizes, stages)
    problems = [found.problem for found in fits if found.problem]
    if problems:
        raise UserError(refusal(config, reach, sizes, stages, problems))
    for found in fits:
        if found.placement and not found.placement.sure:
            log.warning("%s", unsure(found))
    return fits


def unsure(found: StageFit) -> str:
    """What to say of a stage that fits if Ray places it well."""
    return (
        f"{found.stage} fits the cluster only if Ray places its units well (it never moves them): if "
        "it waits forever, ask for less per unit, or add a node"
    )


def refusal(
    config: Config,
    reach: Reach,
    sizes: Sizes | None,
    stages: Collection[str],
    problems: Sequence[str],
) -> str:
    """The message: each stage's arithmetic, and the smallest changes that make all stages fit."""
    from ray_synth.preflight.smallest_fix import fixes

    changes = fixes(config, reach, sizes, stages)
    advice = "\n  or ".join(changes) if changes else "a larger cluster"
    return (
        "this run does not fit the cluster; Ray would wait forever:\n  "
        + "\n  ".join(problems)
        + f"\nThe smallest change that fits: {advice}"
    )


def preflight(
    config: Config, sizes: Sizes | None = None, stages: Collection[str] = STAGES
) -> Reach:
    """Check the connected cluster before a run; waits for what an earlier run still holds.

    Raises:
        UserError: a stage of the run does not fit the cluster, its memory or the disk.
    """
    from ray_synth.preflight.memory import look

    end = time.monotonic() + PATIENCE_S
    while True:
        reach = cluster_reach(config)
        try:
            check_budget(config, reach, sizes, stages)
            break
        except UserError:
            if not (reach.held_cpus or reach.held_gpus) or time.monotonic() > end:
                raise
        time.sleep(0.5)
    found = look(config, reach, sizes, stages, runs_folder(config.runs_dir))
    if found.problems:
        raise UserError("this run does not fit:\n  " + "\n  ".join(found.problems))
    for warning in found.warnings:
        log.warning("%s", warning)
    return reach


def most_at_once(parts: Sequence[Demand], beside: Sequence[Demand], reach: Reach, most: int) -> int:
    """How many times `parts` fit the cluster at once with `beside`, at most `most`; at least 1."""

    def too_many(times: int) -> bool:
        many = [replace(part, count=part.count * times) for part in parts]
        return pack([*many, *beside], reach.nodes, reach.most_added) is None

    return max(1, bisect_left(range(1, most + 1), True, key=too_many))


def table(fits: Sequence[StageFit], reach: Reach) -> list[str]:
    """One line per stage: what it asks for at once, what the cluster reaches, and whether that fits."""
    lines = [f"{'stage':<12}{'asks for':<22}{'reach':<22}fits"]
    whole = f"{reach.cpus:g} CPUs, {reach.gpus:g} GPUs"
    for found in fits:
        verdict = "yes" if found.placement else "NO"
        if found.placement and not found.placement.sure:
            verdict = "if placed well"
        elif found.placement and found.placement.added:
            verdict = f"with {found.placement.added} more nodes"
        asked = f"{found.cpus:g} CPUs, {found.gpus:g} GPUs"
        lines.append(f"{found.stage:<12}{asked:<22}{whole:<22}{verdict}")
    return lines
