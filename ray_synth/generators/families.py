"""What each family of diffusers models needs: steps, guidance, size, context, precision, licence.

In: a pipeline's folder or hub id, of which only small JSON files are read. Out: its `Family`, for the
settings that a config leaves open and for what is said before anything is spent. The numbers are those
of the models' own cards; a family that is not in the table has the defaults of its pipeline's call.

Distilled models share a class with their teacher, so they are told apart by what their folder says: the
scheduler, its spacing or shift, inputs of the denoiser for guidance; and by their names where it says
nothing.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ray_synth.storage.texts import read_json

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What a generator needs to make good images.

    Attributes:
        name: for people.
        steps, guidance, size: what it is run with; `size` is the side of a square in pixels, 0 where
            the denoiser's config has it (`sample_size`, in latents).
        most_steps, most_guidance: more is of no use, and mostly does harm.
        guided_above: guidance is computed, at the cost of a second pass, above this scale.
        multiple: width and height must be multiples of it.
        sizes: the only (width, height) that it makes; empty: any.
        context: tokens that its text encoder reads; 0: what the call or the tokenizer says.
        template: tokens of those that the pipeline writes itself.
        alone: a batch's text is padded or cut to its longest prompt, so that each prompt needs a call
            of its own. (Of a family that is not listed, the generator finds it out.)
        float16: whether its activations stay within float16; else it is run in bfloat16.
        licence: of the weights, as their card names it.
    """

    name: str
    steps: int
    guidance: float
    size: int = 1024
    most_steps: int = 100
    most_guidance: float = 20.0
    guided_above: float = 1.0
    multiple: int = 8
    sizes: tuple[tuple[int, int], ...] = ()
    context: int = 0
    template: int = 0
    alone: bool = False
    float16: bool = True
    licence: str = ""

    @property
    def distilled(self) -> bool:
        """Whether it was made to run in few steps."""
        return self.most_steps <= FEW_STEPS


@dataclass(frozen=True)
class Facts:
    """What a folder says of its pipeline: the small JSON files in it."""

    model: str
    pipeline: str
    index: Config = field(default_factory=dict)
    scheduler: Config = field(default_factory=dict)
    denoiser: Config = field(default_factory=dict)
    vae: Config = field(default_factory=dict)

    def named(self, *words: str) -> bool:
        """Whether the last part of the model's name has one of these words."""
        last = re.split(r"[/\\]", self.model.rstrip("/\\"))[-1].lower()
        return any(word in last for word in words)

    def scheduled(self, name: str) -> bool:
        return str(self.scheduler.get("_class_name", "")) == name

    @property
    def trailing(self) -> bool:
        return self.scheduler.get("timestep_spacing") == "trailing"


FEW_STEPS = 10
OPENRAIL = "CreativeML OpenRAIL-M"
OPENRAIL_PP = "CreativeML OpenRAIL++-M"
STABILITY = "Stability AI Community: free below a yearly revenue of 1 M USD"
FLUX_NC = "FLUX non-commercial"
APACHE = "Apache-2.0"
KLEIN_LICENCE = "Apache-2.0 (4B), FLUX non-commercial (9B)"

SD = Family("Stable Diffusion", 20, 7.5, size=0, context=77, licence=OPENRAIL)
SDXL = Family("SDXL", 30, 5.0, size=0, context=77, licence=OPENRAIL_PP)
SD3 = Family("Stable Diffusion 3", 28, 4.5, size=0, multiple=16, context=256, licence=STABILITY)
FLUX_DEV = Family("FLUX.1 [dev]", 28, 3.5, multiple=16, context=512, licence=FLUX_NC)
FLUX2 = Family(
    "FLUX.2 [dev]", 28, 4.0, multiple=16, context=512, template=60, float16=False, licence=FLUX_NC
)
KLEIN = replace(FLUX2, name="FLUX.2 [klein] base", steps=50, template=20, licence=KLEIN_LICENCE)
PIXART = Family("PixArt", 20, 4.5, size=0, context=120, licence=OPENRAIL_PP)
SANA = Family(
    "Sana", 20, 4.5, multiple=32, context=300, template=2, float16=False, licence="NVIDIA's own"
)
LUMINA2 = Family(
    "Lumina Image 2", 30, 4.0, multiple=16, context=256, template=50, alone=True, float16=False,
    licence=APACHE,
)  # fmt: skip
QWEN = Family(
    "Qwen-Image", 50, 4.0, multiple=16, context=512, template=6, alone=True,
    float16=False, licence=APACHE,
)  # fmt: skip
Z_IMAGE = Family(
    "Z-Image", 28, 4.0, guided_above=0.0, multiple=16, context=512, template=16, alone=True,
    float16=False, licence=APACHE,
)  # fmt: skip
KANDINSKY5 = Family(
    "Kandinsky 5", 50, 3.5, context=512, template=6, alone=True, float16=False, licence="MIT",
    sizes=(
        (1024, 1024), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (896, 1152), (1152, 896),
    ),
)  # fmt: skip


def _few(teacher: Family, name: str, steps: int, guidance: float = 0.0, **more: Any) -> Family:
    """A distilled variant: few steps, and (nearly) no guidance."""
    most = {"most_steps": max(8, steps), "most_guidance": max(1.0, guidance)}
    return replace(teacher, **{"name": name, "steps": steps, "guidance": guidance, **most, **more})


def _latent_consistency(teacher: Family, name: str) -> Family:
    return _few(teacher, name, 4, 1.0, most_guidance=2.0)


Rule = tuple[Callable[[Facts], bool], Family]
# By pipeline class: variants in the order they are looked for, and what it is otherwise.
FAMILIES: dict[str, tuple[tuple[Rule, ...], Family]] = {
    "StableDiffusionPipeline": (
        (
            (
                lambda f: f.denoiser.get("time_cond_proj_dim") is not None,  # guidance is an input
                _few(SD, "LCM", 4, 8.5, most_guidance=14.0, guided_above=20.0),
            ),
            (
                lambda f: f.scheduled("LCMScheduler") or f.named("lcm"),
                _latent_consistency(SD, "Stable Diffusion with LCM"),
            ),
            (
                lambda f: (
                    f.named("turbo") or (f.trailing and f.scheduled("EulerDiscreteScheduler"))
                ),
                _few(SD, "SD-Turbo", 4, licence=STABILITY),
            ),
            (lambda f: f.named("lightning", "hyper"), _few(SD, "Stable Diffusion, few steps", 4)),
        ),
        SD,
    ),
    "StableDiffusionXLPipeline": (
        (
            (
                lambda f: f.denoiser.get("time_cond_proj_dim") is not None,
                _few(SDXL, "SDXL LCM", 4, 8.0, most_guidance=14.0, guided_above=20.0),
            ),
            (
                lambda f: f.scheduled("LCMScheduler") or f.named("lcm"),
                _latent_consistency(SDXL, "SDXL with LCM"),
            ),
            (
                lambda f: (
                    f.named("turbo")
                    or (f.trailing and f.scheduled("EulerAncestralDiscreteScheduler"))
                ),
                _few(SDXL, "SDXL-Turbo", 4, licence=STABILITY),
            ),
            (
                lambda f: (
                    f.named("lightning", "hyper")
                    or (f.trailing and f.scheduled("EulerDiscreteScheduler"))
                ),
                _few(SDXL, "SDXL-Lightning", 4),
            ),
        ),
        SDXL,
    ),
    "StableDiffusion3Pipeline": (
        ((lambda f: f.named("turbo"), _few(SD3, "Stable Diffusion 3.5 Turbo", 4)),),
        SD3,
    ),
    "FluxPipeline": (
        (
            (
                lambda f: f.denoiser.get("guidance_embeds") is False or f.named("schnell"),
                _few(FLUX_DEV, "FLUX.1 [schnell]", 4, context=256, licence=APACHE),
            ),
        ),
        FLUX_DEV,
    ),
    "Flux2Pipeline": ((), FLUX2),
    "Flux2KleinPipeline": (
        (
            (
                lambda f: bool(f.index.get("is_distilled")),
                _few(KLEIN, "FLUX.2 [klein]", 4, 1.0),
            ),
        ),
        KLEIN,
    ),
    "LatentConsistencyModelPipeline": (
        (),
        _few(SD, "LCM", 4, 8.5, most_guidance=14.0, guided_above=20.0),
    ),
    "PixArtAlphaPipeline": (
        (
            (
                lambda f: f.scheduled("LCMScheduler") or f.named("lcm"),
                _few(PIXART, "PixArt-LCM", 4),
            ),
        ),
        replace(PIXART, name="PixArt-alpha"),
    ),
    "PixArtSigmaPipeline": ((), replace(PIXART, name="PixArt-Sigma", context=300)),
    "SanaPipeline": ((), SANA),
    "SanaSprintPipeline": ((), _few(SANA, "Sana-Sprint", 2, 4.5, guided_above=20.0)),
    "Lumina2Pipeline": ((), LUMINA2),
    "QwenImagePipeline": (
        ((lambda f: f.named("lightning", "turbo"), _few(QWEN, "Qwen-Image-Lightning", 8, 1.0)),),
        QWEN,
    ),
    "ZImagePipeline": (
        (
            (
                lambda f: f.named("turbo") or float(f.scheduler.get("shift", 6.0)) <= 3.0,
                _few(Z_IMAGE, "Z-Image-Turbo", 9),
            ),
        ),
        Z_IMAGE,
    ),
    "Kandinsky5T2IPipeline": ((), KANDINSKY5),
}


def listed() -> list[Family]:
    """All families of the table, each name once."""
    found: dict[str, Family] = {}
    for rules, otherwise in FAMILIES.values():
        for family in (otherwise, *(variant for _, variant in rules)):
            found.setdefault(family.name, family)
    return list(found.values())


def recognise(facts: Facts) -> Family:
    """The family of a pipeline, with the size that its denoiser was trained on."""
    rules, otherwise = FAMILIES.get(facts.pipeline, ((), None))
    found = next((family for applies, family in rules if applies(facts)), otherwise)
    if found is None:
        return _by_signature(facts.pipeline)
    if found.size:
        return found
    sample, blocks = facts.denoiser.get("sample_size"), facts.vae.get("block_out_channels")
    latent = 2 ** (len(blocks) - 1) if blocks else 8
    return replace(found, size=latent * sample if isinstance(sample, int) else 1024)


def guidance_argument(call: Mapping[str, inspect.Parameter]) -> str:
    """The argument of a pipeline's call that guidance goes by; "" where it takes none.

    Where `guidance_scale` has no value by default it is for models with guidance as an input, and
    the other names are those that work (Qwen-Image).
    """
    named = [
        name
        for name in ("guidance_scale", "true_cfg_scale", "prior_guidance_scale")
        if name in call
    ]
    valued = [name for name in named if call[name].default is not None]
    return (valued or named or [""])[0]


def _by_signature(pipeline: str) -> Family:
    """A family that the table has not: the defaults of its pipeline's own call."""
    import diffusers

    kind = getattr(diffusers, pipeline, None)
    call = inspect.signature(kind.__call__).parameters if kind else {}

    def default(name: str, otherwise: Any) -> Any:
        found = call[name].default if name in call else None
        return found if isinstance(found, int | float) else otherwise

    return Family(
        pipeline,
        steps=int(default("num_inference_steps", 30)),
        guidance=float(default(guidance_argument(call), 5.0)),
        size=int(default("height", 1024)),
    )


def read_facts(
    model: str, index: Config, revision: str | None = None, scheduler: str | None = None
) -> Facts:
    """What a pipeline's folder or hub id says of itself, besides its index.

    Args:
        model: a folder, or a hub id whose small files are fetched.
        scheduler: the class that the config puts in place of the folder's own.
    """
    given = index.get("_class_name", "")
    pipeline = str(given[-1] if isinstance(given, list | tuple) else given)
    part = "unet" if (index.get("unet") or [None])[0] else "transformer"
    schedule = _read(model, "scheduler/scheduler_config.json", revision)
    if scheduler:
        schedule = {**schedule, "_class_name": scheduler}
    configs = [_read(model, f"{name}/config.json", revision) for name in (part, "vae")]
    return Facts(model, pipeline, index, schedule, *configs)


def _read(model: str, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of a model; {} where it has none."""
    from transformers.utils import cached_file

    path = cached_file(
        model,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    return dict(read_json(path))
