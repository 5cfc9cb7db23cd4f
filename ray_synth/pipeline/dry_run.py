"""What a command would do, before anything is spent: no Ray, no model, nothing written.

The data are listed and the run directory is looked at, as a run does first; so what a run would refuse
is refused here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ray_synth.config import Config
from ray_synth.errors import duration
from ray_synth.pipeline.kept import check_kept
from ray_synth.pipeline.practice import rounds_of
from ray_synth.pipeline.run import Run, check_run
from ray_synth.preflight.demands import asks_for_contexts
from ray_synth.preflight.outlook import gpu_of, outlook
from ray_synth.report.status import read_images
from ray_synth.stages import REPORT, up_to
from ray_synth.training.job import total_steps


@dataclass(frozen=True)
class Step:
    """One stage of the plan.

    Attributes:
        done: before; it would be skipped.
        makes: what it would make, or has made.
        seconds: that it took, where it is done.
    """

    stage: str
    done: bool
    makes: str
    seconds: float | None = None


@dataclass(frozen=True)
class DryRun:
    """What a command would do.

    Attributes:
        run: the run's directory.
        steps: the stages up to the one where the command stops.
        left_out: what of the data would not be used.
        cost: figures of the whole run by name; empty where nothing is known without a probe.
        cost_said: the same for people.
    """

    run: str
    steps: list[Step]
    left_out: list[str]
    cost: dict[str, float]
    cost_said: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """A table for people."""
        rows = [f"{'stage':<12}{'':<8}what it makes"]
        for step in self.steps:
            took = f", took {duration(step.seconds)}" if step.seconds is not None else ""
            rows.append(f"{step.stage:<12}{'done' if step.done else 'to do':<8}{step.makes}{took}")
        rows += [f"warning: {line}" for line in self.left_out]
        return [*rows, f"cost: {self.cost_said}", f"in {self.run}; nothing was started or written"]


def dry_run(config: Config, *, until: str = REPORT, force_stage: str | None = None) -> DryRun:
    """What `run_pipeline` with the same arguments would do.

    Raises:
        UserError: as `run_pipeline` would before it starts Ray.
    """
    stages = up_to(until)
    run = check_run(config, force_stage)
    check_kept(run)
    makes = _makes(run, fresh=force_stage is not None)
    seconds = run.records.seconds()
    steps = [Step(stage, stage in seconds, makes[stage], seconds.get(stage)) for stage in stages]
    if until == REPORT:
        steps.append(Step(REPORT, False, "metrics.json, report/index.html"))
    cost, said = _cost(run, until)
    return DryRun(run.folder.address(), steps, run.left_out, cost, said)


def _makes(run: Run, *, fresh: bool) -> dict[str, str]:
    """By stage, what it makes."""
    config, sizes = run.config, run.sizes
    training, checks = config.training, config.generation.checks
    tests = ", ".join(f"{count:,} of {name}" for name, count in sizes.tests.items())
    planned = sizes.synthetic(config)
    images = "images, as many as the plan has" if planned is None else f"{planned:,} images"
    stored = read_images(run.folder).stored
    if stored and not fresh and "generation" not in run.records.seconds():
        images += f", {stored:,} of them are there"
    contexts = f", scenes for {sizes.classes:,} classes" if asks_for_contexts(config) else ""
    arms = [f"{arm} {total_steps(run.arm_config(arm), len(run.train)):,} steps" for arm in run.arms]
    meaning = f"{sizes.classes:,} classes"
    return {
        "data": f"{sizes.real:,} training images decoded once",
        "meaning": f"meanings of {meaning}" if config.meaning.enabled else f"{meaning}, as named",
        "plan": f"{'prompts' if planned is None else f'{planned:,} prompts'}{contexts}{_rounds(run)}",
        "quality": "thresholds from real images" if checks.need_clip else "nothing: no check asks",
        "generation": images,
        "training": f"{', '.join(arms)}, {training.model} at {training.image_size} px",
        "evaluation": f"test images: {tests}",
    }


def _rounds(run: Run) -> str:
    """How a plan comes in rounds: the first now, the others while the mixed model is trained."""
    if run.config.prompting.practice is None:
        return ""
    rounds = rounds_of(run)
    each = ", ".join(f"{images:,}" for images in rounds.images)
    stops = ", ".join(f"{stop:,}" for stop in rounds.stops[:-1])
    return f", in {len(rounds)} rounds of {each}; the model is asked after steps {stops}"


def _cost(run: Run, until: str) -> tuple[dict[str, float], str]:
    """What the whole takes: as an estimate measured it, else by arithmetic where GPUs are named."""
    config = run.config
    if not run.todo(until):
        return {}, "none but the report's: every stage is done"
    found: dict[str, float] = {}
    said = []
    options = (
        config.generation.generator_kwargs if config.generation.generator == "endpoint" else {}
    )
    if price := float(options.get("price_per_image") or 0):
        found["images"] = price * (run.sizes.synthetic(config) or 0)
        said.append(f"images {found['images']:,.2f} at {price:g} each, tries of new seeds aside")
    if run.folder.exists("estimate.json"):
        kept = run.folder.read_json("estimate.json")
        found |= {"seconds": kept["total"], **kept["hours"], "cost": kept["cost"]}
        price_said = f", cost {kept['cost']:,.2f}" if kept["cost"] else ""
        hours = f"{kept['hours']['gpu_hours']:.2f} GPU-hours{price_said}"
        said.append(f"{duration(kept['total'])} and {hours}, as a probe of this run found")
    elif config.generation.num_gpus and config.training.num_gpus and gpu_of(config):
        whole = outlook(config, run.sizes)
        found |= {"seconds": whole.seconds, "gpu_hours": whole.gpu_hours, "cost": whole.cost}
        price_said = f", cost {whole.cost:,.2f}" if whole.price_per_gpu_hour else ""
        said.append(
            f"{duration(whole.seconds)} and {whole.gpu_hours:,.1f} GPU-hours{price_said} for the "
            "whole run, by arithmetic"
        )
    else:
        said.append("not known without a probe of the cluster: `ray-synth doctor --estimate`")
    return found, "; ".join(said)
