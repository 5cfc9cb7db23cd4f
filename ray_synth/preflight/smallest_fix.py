"""The smallest change that makes a run fit: one or two settings, or nodes of one kind; pure.

Candidates are tried in order of what they cost, those that leave the result of the run as it is first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from ray_synth.config import Config
from ray_synth.preflight.demands import Sizes, demands, shared_training_gpu
from ray_synth.preflight.packing import Demand, Nodes, pack
from ray_synth.preflight.reach import Reach
from ray_synth.stages import STAGES

FRACTIONS = (0.5, 0.25, 0.1)
MOST_NODES = 1024  # added at most
MOST_SETTINGS = 3  # changed at a time


@dataclass(frozen=True)
class Change:
    """One setting's new value, and what it costs: from 1 on, more than speed."""

    key: str
    value: Any
    cost: float

    @property
    def text(self) -> str:
        value = self.value
        if isinstance(value, tuple):
            return f"'{self.key}={list(value)}'"
        return f"{self.key}={value:g}" if isinstance(value, float) else f"{self.key}={value}"


def fixes(
    config: Config,
    reach: Reach,
    sizes: Sizes | None = None,
    stages: Collection[str] = STAGES,
) -> list[str]:
    """Up to three ways, each of which is enough: settings, logical CPUs of a local Ray, nodes."""
    ways = []
    if reach.local and (cpus := _local_cpus(config, reach, sizes, stages)):
        ways.append(f"--set cluster.num_cpus={cpus}")
    if settings := _settings(config, reach, sizes, stages):
        ways.append(" ".join(f"--set {change.text}" for change in settings))
    if nodes := _nodes(config, reach, sizes, stages):
        ways.append(nodes)
    return ways


def fits(config: Config, reach: Reach, sizes: Sizes | None, stages: Collection[str]) -> bool:
    """Whether every stage does."""
    if "training" in stages and shared_training_gpu(config):
        return False
    return all(
        pack(parts, reach.nodes, reach.most_added) is not None
        for stage, parts in demands(config, sizes).items()
        if stage in stages
    )


def changed(config: Config, changes: Collection[Change]) -> Config:
    """The config with some settings changed."""
    for change in changes:
        config = _with(config, change.key.split("."), change.value)
    return config


def _with(section: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _with(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: value})


def _local_cpus(
    config: Config, reach: Reach, sizes: Sizes | None, stages: Collection[str]
) -> int | None:
    """The fewest logical CPUs of a local Ray; None where CPUs are not what is missing."""
    (here,) = reach.nodes if len(reach.nodes) == 1 else (None,)
    if here is None or here.count != 1:
        return None
    now = here.cpus + reach.held_cpus
    for cpus in range(int(now) + 1, int(now) + MOST_NODES):
        more = replace(reach, nodes=(replace(here, cpus=cpus - reach.held_cpus),))
        if fits(config, more, sizes, stages):
            return cpus
        if any(
            pack([replace(p, cpus=0.0) for p in parts], more.nodes) is None
            for stage, parts in demands(config, sizes).items()
            if stage in stages
        ):
            return None
    return None


def _settings(
    config: Config, reach: Reach, sizes: Sizes | None, stages: Collection[str]
) -> tuple[Change, ...] | None:
    """The cheapest of the smallest sets of settings that are enough; mild ones where they can be."""
    whole = Change("training.num_gpus", 1, 0)
    if shared_training_gpu(config) and fits(changed(config, [whole]), reach, sizes, stages):
        return (whole,)
    options = sorted(_options(config, sizes, stages), key=lambda change: change.cost)
    mild = [change for change in options if change.cost < 1]
    return _cheapest(mild, config, reach, sizes, stages) or _cheapest(
        options, config, reach, sizes, stages
    )


def _cheapest(
    options: list[Change],
    config: Config,
    reach: Reach,
    sizes: Sizes | None,
    stages: Collection[str],
) -> tuple[Change, ...] | None:
    steps: dict[str, list[Change]] = {}
    for change in options:
        steps.setdefault(change.key, []).append(change)

    def enough(*changes: Change) -> bool:
        return fits(changed(config, changes), reach, sizes, stages)

    if not enough(*(step[-1] for step in steps.values())):
        return None
    for number in range(1, MOST_SETTINGS + 1):
        found: list[tuple[Change, ...]] = []
        for keys in combinations(steps, number):
            if not enough(*(steps[key][-1] for key in keys)):
                continue  # not even all of it helps
            *firsts, last = sorted(keys, key=lambda key: len(steps[key]))
            for given in product(*(_some(steps[key]) for key in firsts)):
                # Each step asks for less than the one before: the first that is enough.
                at = bisect_left(steps[last], True, key=lambda step: enough(*given, step))
                if at < len(steps[last]):
                    found.append((*given, steps[last][at]))
        if found:
            return min(found, key=lambda changes: sum(change.cost for change in changes))
    return None


def _some(changes: list[Change]) -> list[Change]:
    """At most a handful, the smallest and the largest step among them."""
    return changes if len(changes) <= 6 else [*changes[:3], changes[len(changes) // 2], changes[-1]]


def _options(config: Config, sizes: Sizes | None, stages: Collection[str]) -> Iterator[Change]:
    """What could be lowered of what the stages ask for; a smaller step costs less.

    Below a cost of 1 it is the speed alone that changes. GPUs that are shared may run out of memory;
    images that are all made before training change what the training sees, and fewer workers how
    many images per step.
    """
    asked: dict[str, Demand] = {}
    for stage, parts in demands(config, sizes).items():
        if stage in stages:
            asked |= {part.what: part for part in parts}
    for what, section in SECTIONS.items():
        if what not in asked:
            continue
        part, given = asked[what], _value(config, what)
        for number in range(part.count - 1, 0, -1):
            value = number if isinstance(given, int) else (number, given[1])
            lost = (1 - number / part.count) / 2
            if what == "generation.pool.min_size":
                lost /= 4
            yield Change(what, value, lost + (3 if what == "training.num_workers" else 0))
        for share in FRACTIONS:
            if share < part.cpus:
                yield Change(f"{section}.num_cpus", share, 0.5 + (1 - share / part.cpus) / 4)
        if part.gpus > 1 and part.gpus != int(part.gpus):
            yield Change(f"{section}.num_gpus", float(int(part.gpus)), 0.5)
        for share in FRACTIONS:
            if share < part.gpus:
                yield Change(f"{section}.num_gpus", share, 2 + (1 - share / part.gpus) / 4)
    if "training" in stages and config.training.feed != "stored":
        yield Change("training.feed", "stored", 1.3)


SECTIONS = {
    "generation.pool.min_size": "generation",
    "training.num_workers": "training",
    "meaning.llm.replicas": "meaning.llm",
    "meaning.clip.replicas": "meaning.clip",
    "evaluation.num_actors": "evaluation",
}


def _value(config: Config, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _nodes(
    config: Config, reach: Reach, sizes: Sizes | None, stages: Collection[str]
) -> str | None:
    """The fewest nodes of one kind: one that the cluster has, or one as large as the largest unit."""
    parts = [p for s, found in demands(config, sizes).items() if s in stages for p in found]
    largest = Nodes(1, max(p.cpus for p in parts), max(p.gpus for p in parts))
    whole = Nodes(1, float(-(-largest.cpus // 1)), float(-(-largest.gpus // 1)))
    kinds = {replace(n, count=1, added=False, name="", memory=0) for n in reach.nodes} | {whole}
    best: tuple[int, float, Nodes] | None = None
    for kind in kinds:
        number = _how_many(kind, config, reach, sizes, stages)
        if number and (best is None or (number, kind.cpus + 8 * kind.gpus) < best[:2]):
            best = (number, kind.cpus + 8 * kind.gpus, kind)
    if best is None:
        return None
    number, _, kind = best
    gpus = f" and {kind.gpus:g} GPU{'s' if kind.gpus != 1 else ''}" if kind.gpus else ""
    each = " each" if number > 1 else ""
    return (
        f"add {number} node{'s' if number > 1 else ''} with {kind.cpus:g} CPU"
        f"{'s' if kind.cpus != 1 else ''}{gpus}{each} (or say in cluster.max_reach that they come)"
    )


def _how_many(
    kind: Nodes, config: Config, reach: Reach, sizes: Sizes | None, stages: Collection[str]
) -> int | None:
    """The fewest nodes of a kind that are enough, by doubling and halving."""

    def enough(number: int) -> bool:
        more = replace(reach, nodes=(*reach.nodes, replace(kind, count=number, added=False)))
        return fits(config, more, sizes, stages)

    high = 1
    while not enough(high):
        high *= 2
        if high > MOST_NODES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
