"""Seconds, device hours and cost of each stage, from what a short probe measured; pure arithmetic.

    a stage = what its start takes + how much there is to do x what one of it takes

Generation and training overlap. Where they share the same cores (a laptop) each is slower for it, as
slow as the probe saw it beside the other.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from ray_synth.config import Config, PracticeConfig, TrainingConfig
from ray_synth.preflight.demands import Sizes, asks_for_contexts, demands
from ray_synth.stages import STAGES
from ray_synth.training.brief import is_brief_baseline
from ray_synth.training.job import total_steps
from ray_synth.training.published import recipe_alone


@dataclass(frozen=True)
class Measured:
    """What the probe saw, in seconds.

    Attributes:
        service_start: until the language model and CLIP serve.
        meaning, contexts: per class, with many asked at once.
        quality: the whole task on so many real images as it will have.
        make_start: until the first image could be begun; `make`: per image of one actor, judged,
            encoded and kept.
        train_start: until the first step is done; `train_end`: from the last one.
        step_real, step_mixed: per optimizer step of one worker.
        step_beside, make_beside: the same while the other is at work on the same cores.
        save: per checkpoint.
        test_start: until the first test image could be begun; `test`: per image through one model.
        data, around: the stage `data`, and what lies before and after all stages.
    """

    service_start: float = 0.0
    meaning: float = 0.0
    contexts: float = 0.0
    quality: float = 0.0
    make_start: float = 0.0
    make: float = 0.0
    train_start: float = 0.0
    train_end: float = 0.0
    step_real: float = 0.0
    step_mixed: float = 0.0
    step_beside: float = 0.0
    make_beside: float = 0.0
    save: float = 0.0
    test_start: float = 0.0
    test: float = 0.0
    data: float = 0.0
    around: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What a run should take.

    Attributes:
        seconds: of each stage; `around` is what lies before and after them.
        hours: `gpu_hours` and `cpu_hours` that the stages' units reserve.
        cost: by `cluster.price_per_gpu_hour` and `price_per_cpu_hour`.
    """

    seconds: dict[str, float]
    hours: dict[str, float]
    cost: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def estimate(
    config: Config,
    sizes: Sizes,
    measured: Measured,
    *,
    shared: bool,
    stages: Collection[str] = STAGES,
) -> Estimate:
    """The stages that are to do.

    Args:
        sizes: all of it known.
        shared: generation and training run on the same cores.
    """
    synthetic = sizes.synthetic(config)
    assert sizes.real is not None and sizes.classes is not None and synthetic is not None
    m, training = measured, config.training
    served = config.meaning.enabled and "meaning" in stages
    found = {
        "data": m.data,
        "meaning": m.service_start + sizes.classes * m.meaning if config.meaning.enabled else 0.0,
        "plan": (0.0 if served else m.service_start) + sizes.classes * m.contexts
        if asks_for_contexts(config)
        else 0.0,
        "quality": m.quality if demands(config, sizes)["quality"] else 0.0,
    }
    pool = 1 if shared else config.generation.pool.max_size
    made = m.make_start + _drawn(config.prompting.practice, synthetic) * m.make / pool
    steps = total_steps(training, sizes.real)
    crowd = training.max_workers if shared else 1  # workers that share the cores
    once = m.train_start + m.train_end + (steps // training.checkpoint_every) * m.save
    practice = config.prompting.practice  # between rounds, workers, makers and a scorer start anew
    again = (practice.rounds - 1 if practice else 0) * (
        m.train_start + m.train_end + m.save + m.make_start + m.test_start
    )
    batches = steps * training.accumulate_steps * crowd
    alone = _baselines(training, m, sizes.real, once, crowd)
    mixed = batches * m.step_mixed
    first = training.feed == "stored" or config.take_over is not None  # as `steps.run_stages`
    if first or "training" not in stages:
        found |= {"generation": made, "training": alone + once + mixed + again}
    else:
        drawn = round(_drawn(practice, synthetic))
        beside, left = _beside(config, m, drawn, pool, batches, crowd, shared)
        found["training"] = alone + once + again + m.make_start + beside
        # A live feed's generators go on to the end, and each round is made whole.
        if practice or (training.feed == "live" and not training.num_gpus):
            found["training"] += left
            left = 0.0
        found["generation"] = m.make_start + left if left else 0.0
    models = len(config.evaluation.bns) if training.dual_bn else 1
    models += len(training.baselines)
    testers = 1 if shared else config.evaluation.num_actors
    tested = sum(sizes.tests.values()) * models * m.test / testers
    found["evaluation"] = m.test_start + tested
    seconds = {stage: found[stage] for stage in STAGES if stage in stages}
    return priced(config, sizes, {**seconds, "around": m.around})


def _drawn(practice: PracticeConfig | None, synthetic: int) -> float:
    """Images that are made, those included that a learner passes over. What guidance takes at each step
    is not counted."""
    if practice is None or practice.select is None:
        return synthetic
    later = 1 - (practice.first or 1 / practice.rounds)
    return synthetic * (1 + later * (practice.select.factor - 1))


def _baselines(
    training: TrainingConfig, m: Measured, images: int, once: float, crowd: int
) -> float:
    """Seconds of the baselines; what is brief starts no workers.

    Args:
        once: what starting and ending a training takes.
        crowd: workers that share the cores.
    """
    found = 0.0
    for arm in training.baselines:
        own = recipe_alone(training) if arm == "recipe" else training
        steps = total_steps(own, images)
        brief = is_brief_baseline(own, steps, images)
        # In batches of as many real images as the probe took.
        batches = steps * own.accumulate_steps * own.num_real / training.num_real
        found += 0.0 if brief else once
        found += crowd * batches * m.step_real
    return found


def _beside(
    config: Config, m: Measured, synthetic: int, pool: int, batches: int, crowd: int, shared: bool
) -> tuple[float, float]:
    """Seconds of training on images that are being made, and of what is left to make after it.

    Args:
        batches: of all workers that share the cores, `crowd`; of one, where they do not.
    """
    training = config.training
    make, step = m.make / pool, m.step_mixed
    make_beside, step_beside = make, step
    if shared and m.make_beside and m.step_beside:  # not measured where training is done
        make_beside, step_beside = m.make_beside, m.step_beside
    workers = training.max_workers
    if training.feed == "lockstep":  # waits for each image once, then goes round
        needed = min(synthetic, batches * training.num_synth * workers // crowd)
        making, stepping = needed * make, batches * step
        # 1 where nothing is lost by sharing.
        speed = step / step_beside + make / make_beside
        took = (making + stepping) / speed if shared else max(making, stepping)
        return took, (synthetic - needed) * make
    warmup = training.warmup_images or 2 * training.num_synth
    first = min(synthetic, warmup * workers)
    together = min(batches * step_beside, (synthetic - first) * make_beside)
    alone = (batches - together / step_beside) * step
    left = (synthetic - first - together / make_beside) * make
    return first * make + together + alone, left if left > 1e-6 else 0.0


def priced(config: Config, sizes: Sizes, seconds: dict[str, float]) -> Estimate:
    """With the hours that the units of the stages reserve while they are at work, and their price.

    Pools count with their most.
    """
    largest = {
        "generation.pool.min_size": config.generation.pool.max_size,
        "training.num_workers": config.training.max_workers,
    }
    cpus = gpus = 0.0
    for stage, parts in demands(config, sizes).items():
        for part in parts:
            hours = seconds.get(stage, 0.0) / 3600 * largest.get(part.what, part.count)
            cpus += hours * part.cpus
            gpus += hours * part.gpus
    prices = config.cluster
    cost = gpus * prices.price_per_gpu_hour + cpus * prices.price_per_cpu_hour
    return Estimate(seconds, {"gpu_hours": gpus, "cpu_hours": cpus}, cost)


def lines(found: Estimate) -> list[str]:
    """A table for people."""
    rows = [f"{stage:<12}{seconds:>9.0f} s" for stage, seconds in found.seconds.items() if seconds]
    rows.append(f"{'total':<12}{found.total:>9.0f} s")
    used = [
        f"{found.hours['cpu_hours']:.2f} CPU-hours",
        f"{found.hours['gpu_hours']:.2f} GPU-hours",
    ]
    rows.append("reserved: " + ", ".join(used) + (f", cost {found.cost:.2f}" if found.cost else ""))
    return rows


def compare(expected: Estimate, taken: Estimate) -> str:
    """`estimate: 200 s expected, 210 s taken (-5%); meaning 30/31, ...`, and cost where it has one."""
    parts = [
        f"{stage} {seconds:.0f}/{taken.seconds[stage]:.0f}"
        for stage, seconds in expected.seconds.items()
        if stage in taken.seconds and (seconds or taken.seconds[stage] >= 1)
    ]
    cost = (
        f"; cost {expected.cost:.2f} expected, {taken.cost:.2f} taken "
        f"({100 * (expected.cost / taken.cost - 1):+.0f}%)"
        if taken.cost
        else ""
    )
    return (
        f"estimate: {expected.total:.0f} s expected, {taken.total:.0f} s taken "
        f"({100 * (expected.total / taken.total - 1):+.0f}%); "
        f"expected/taken by stage: {', '.join(parts)}{cost}"
    )
