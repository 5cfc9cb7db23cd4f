"""Studies of where words and images come from: language models, generators, rivals. Pure."""

from __future__ import annotations

from typing import Any

from ray_synth.config import Config
from ray_synth.generators.registry import filled
from ray_synth.studies.arm import Arm
from ray_synth.studies.design import REAL, Study


def llms(config: Config, counts: dict[str, int]) -> Study:
    """The config's language models, or its own one asked in the other way."""
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


def generators(config: Config, counts: dict[str, int]) -> Study:
    """The config's generators, or its own one with other steps and guidance."""
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


def rivals(config: Config, counts: dict[str, int]) -> Study:
    """The recipe, a tuned generator, and retrieved real images."""
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
