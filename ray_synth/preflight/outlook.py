"""What a run would take, by arithmetic alone: no cluster, no data, no model need be at hand.

    generation  images x what one H100 needs for one of Stable Diffusion 1.5 (measured), by steps,
                pixels and guidance, and by the GPUs' half-precision peaks
    training    3 x the operations of a forward pass (counted on torch's meta device) per image, at a
                share of the GPU's peak; but no faster than its CPUs decode
    disk        as the preflight counts it

Good to a factor of two where a GPU is not an H100, and nobody has compared it with a whole run: a probe
of the cluster (`ray-synth doctor --estimate`) measures. Not in it: the language model's questions,
evaluation, nodes that must first come.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ray_synth.config import Config, TrainingConfig
from ray_synth.errors import UserError
from ray_synth.preflight.demands import Sizes
from ray_synth.preflight.memory import disk_needs
from ray_synth.training.job import total_steps
from ray_synth.training.published import recipe_alone

# Dense half-precision TFLOP/s by the makers' data sheets.
PEAK = {
    "T4": 65, "V100": 125, "A10G": 70, "L4": 121, "L40S": 362, "A100": 312, "A100-40G": 312,
    "A100-80G": 312, "H100": 989, "H200": 989, "B200": 2250,
}  # fmt: skip
# Measured on one H100: SD 1.5, 512 px, 20 steps, guidance, channels_last, eager and compiled.
SD_IMAGES_PER_S = {False: 7.35, True: 10.6}
SD_STEPS, SD_PIXELS = 20, 512 * 512
# Share of the data sheet's peak that training reaches: ResNet-50 at 224 px on an H100, eager and compiled
# (measured; taken for all convolutional networks); of transformers, whose products are larger (ours).
CONV_SHARE = {False: 0.10, True: 0.14}
OTHER_SHARE = 0.3
DECODED_PER_CORE_S = 170  # photographs to 224 px with random crops, per core (measured)


@dataclass(frozen=True)
class Part:
    """One part of a run.

    Attributes:
        what: generation, or an arm of training.
        gpus: at work at once.
        seconds: that it takes alone.
        bound: what a faster one would need.
    """

    what: str
    gpus: float
    seconds: float
    bound: str

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.seconds / 3600


@dataclass(frozen=True)
class Outlook:
    """What a run would take.

    Attributes:
        parts: in order.
        overlapped: the mixed arm trains while images are made.
        bytes: on the disk or in the bucket.
    """

    parts: tuple[Part, ...]
    overlapped: bool
    bytes: int
    price_per_gpu_hour: float
    notes: tuple[str, ...] = field(default=())

    @property
    def gpu_hours(self) -> float:
        return sum(part.gpu_hours for part in self.parts)

    @property
    def seconds(self) -> float:
        """From the first image to the last step."""
        both = {"generation", "training mixed"}
        beside = [p.seconds for p in self.parts if self.overlapped and p.what in both]
        alone = [p.seconds for p in self.parts if not (self.overlapped and p.what in both)]
        return sum(alone) + max(beside, default=0.0)

    @property
    def cost(self) -> float:
        return self.gpu_hours * self.price_per_gpu_hour

    @property
    def bottleneck(self) -> Part:
        return max(self.parts, key=lambda part: part.seconds)

    def as_dict(self) -> dict[str, Any]:
        """For programs: all that `lines` prints."""
        return {
            "parts": [{**vars(part), "gpu_hours": part.gpu_hours} for part in self.parts],
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "bottleneck": self.bottleneck.what,
            "notes": list(self.notes),
        }


def outlook(config: Config, sizes: Sizes, gpu: str | None = None) -> Outlook:
    """Of a whole run with as many images and classes as `sizes` says.

    Args:
        gpu: Ray's name of the GPUs' type; default: what `cluster.max_reach` names.

    Raises:
        UserError: the GPUs' type is not known.
    """
    assert sizes.real is not None
    training = config.training
    gpu = gpu or gpu_of(config)
    if gpu not in PEAK:
        raise UserError(
            f"no GPU type is known (given: {gpu}): name one of {', '.join(PEAK)} with --gpu, or as the "
            "accelerator of cluster.max_reach"
        )
    parts = [_training(name, config, sizes, PEAK[gpu]) for name in training.baselines]
    parts += [_generation(config, sizes, PEAK[gpu]), _training("mixed", config, sizes, PEAK[gpu])]
    images, rest = disk_needs(config, sizes)
    notes = []
    if (
        config.generation.generator == "diffusers"
        and "stable-diffusion-v1" not in config.generation.model
    ):
        notes.append(f"{config.generation.model} is counted as Stable Diffusion 1.5")
    return Outlook(
        tuple(parts), training.feed != "stored", images + rest,
        config.cluster.price_per_gpu_hour, tuple(notes),
    )  # fmt: skip


def gpu_of(config: Config) -> str | None:
    """The slowest of the GPU types that `cluster.max_reach` names."""
    reach = config.cluster.max_reach
    named = [n.accelerator for n in reach.nodes if n.num_gpus] if reach else []
    known = [name for name in named if name in PEAK]
    return min(known, key=lambda name: PEAK[name]) if known else None


def images_per_second(config: Config, peak: float) -> float:
    """That one GPU makes."""
    generation = config.generation
    compiled = generation.compile is not False
    pixels = (generation.width or 512) * (generation.height or 512)
    work = (generation.num_inference_steps or SD_STEPS) / SD_STEPS * pixels / SD_PIXELS
    guided = 1.0 if (generation.guidance_scale or 0) > 1 else 0.5
    return SD_IMAGES_PER_S[compiled] / (work * guided) * peak / PEAK["H100"]


def _generation(config: Config, sizes: Sizes, peak: float) -> Part:
    made = sizes.synthetic(config) or 0
    gpus = config.generation.pool.max_size * max(config.generation.num_gpus, 0.0)
    rate = images_per_second(config, peak)
    text = f"{gpus:g} GPUs that make {rate:.1f} images/s each"
    return Part("generation", gpus, made / (rate * max(gpus, 1e-9)), text)


def _training(arm: str, config: Config, sizes: Sizes, peak: float) -> Part:
    assert sizes.real is not None
    training = config.training
    alone = recipe_alone(training) if arm == "recipe" else training
    batch = alone.num_real + (alone.num_synth if arm == "mixed" else 0)
    steps = total_steps(alone, sizes.real) * alone.accumulate_steps
    forward, conv = forward_flops(alone.model, json.dumps(alone.model_kwargs), alone.image_size)
    share = CONV_SHARE[alone.compile] if conv else OTHER_SHARE
    computed = share * peak * 1e12 * max(alone.num_gpus, 1e-9) / (3 * forward)
    decoded = _decoded_per_second(alone)
    rate = min(computed, decoded)
    bound = (
        f"decoding: {alone.num_cpus:g} CPUs per worker decode {decoded:,.0f} images/s, its GPU takes "
        f"{computed:,.0f}"
        if decoded < computed
        else f"{alone.max_workers} workers that take {computed:,.0f} images/s each"
    )
    gpus = alone.max_workers * alone.num_gpus
    return Part(f"training {arm}", gpus, steps * batch / rate, bound)


def _decoded_per_second(training: TrainingConfig) -> float:
    """Photographs that one worker's CPUs decode; a core is kept for the training loop itself."""
    return DECODED_PER_CORE_S * max(1.0, training.num_cpus - 1)


@lru_cache(maxsize=8)
def forward_flops(model: str, model_kwargs: str, image_size: int) -> tuple[float, bool]:
    """Operations of one image's forward pass (a multiply-add is two), and whether it is a convolutional
    network: one with more than the layer that cuts an image into patches."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ray_synth.training import recipe

    with torch.device("meta"):
        built = recipe.build_model(
            model, num_classes=1000, model_kwargs=json.loads(model_kwargs)
        ).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        built(torch.empty(1, 3, image_size, image_size, device="meta"))
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in built.modules())
    return counter.get_total_flops(), convolutions > 1


def lines(found: Outlook, name: str = "in all") -> list[str]:
    """A table for people: parts, then GPU-hours, dollars, TB, days and what bounds it."""
    rows = [f"{'':<20}{'GPUs':>6}{'GPU-hours':>12}{'days':>8}  bound by"]
    for part in found.parts:
        days = part.seconds / 86_400
        rows.append(
            f"{part.what:<20}{part.gpus:>6g}{part.gpu_hours:>12,.0f}{days:>8.1f}  {part.bound}"
        )
    price = f"${found.cost:,.0f}" if found.price_per_gpu_hour else "no price given"
    slowest = found.bottleneck
    rows.append(
        f"{name}: {found.gpu_hours:,.0f} GPU-hours, {price}, {found.bytes / 1e12:.2f} TB, "
        f"{found.seconds / 86_400:.1f} days; bottleneck: {slowest.what}, {slowest.bound}"
    )
    return rows + [f"note: {note}" for note in found.notes]
