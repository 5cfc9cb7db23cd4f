"""How the config names a generator: diffusers, or a plug-in (`generators/protocol.py`).

A plug-in is named `module:Class`, or by an entry point of the group `ray_synth.generators` in an
installed package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Sequence

from ray_synth.config import GenerationConfig
from ray_synth.errors import UserError
from ray_synth.generators.knowledge import strangers, uses_embedded
from ray_synth.generators.protocol import PLUGIN, ImageGenerator, digest_settings

log = logging.getLogger("ray_synth")
GROUP = "ray_synth.generators"


def generator_class(name: str) -> type[ImageGenerator]:
    """The class that `generation.generator` names.

    Raises:
        UserError: no such plug-in, module or class.
    """
    if name == "diffusers":
        from ray_synth.generators.diffusion import DiffusionGenerator

        return DiffusionGenerator
    module, separator, attribute = name.partition(":")
    try:
        if separator:
            return getattr(importlib.import_module(module), attribute)
        found = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
        if name in found:
            return found[name].load()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot load the generator {name!r}: {error}") from None
    raise UserError(
        f"unknown generator {name!r}: generation.generator takes 'diffusers', module:Class, or one "
        f"of the installed plug-ins ({', '.join(sorted(found)) or 'none'})"
    )


def check_generator(config: GenerationConfig) -> None:
    """Raises UserError for what can be known to be wrong before a cluster is started."""
    found = generator_class(config.generator)
    check = getattr(found, "check", None)
    if check is not None:
        check(config)


def check_plan(config: GenerationConfig, num_images: int) -> None:
    """Raises UserError where the generator refuses a plan of so many images: its budget is too small."""
    check = getattr(generator_class(config.generator), "check_plan", None)
    if check is not None:
        check(config, num_images)


def check_guidance(config: GenerationConfig) -> None:
    """Raises UserError where a learner cannot guide the generator, before anything is spent."""
    check = getattr(generator_class(config.generator), "check_guidance", None)
    if check is None:
        raise UserError(
            f"prompting.practice.guidance is for diffusers pipelines, and generation.generator is "
            f"{config.generator!r}: leave it out; select works with any generator"
        )
    check(config)


def filled(config: GenerationConfig) -> GenerationConfig:
    """The config with steps, guidance and size set, where it leaves them to the generator.

    Raises:
        UserError: no such generator, or its model cannot be read.
    """
    own = getattr(generator_class(config.generator), "filled", None)
    if own is not None:
        return own(config)
    open_ = {name: value for name, value in PLUGIN.items() if getattr(config, name) is None}
    return config.model_copy(update=open_) if open_ else config


def advise(config: GenerationConfig, negative_prompt: str, class_names: Sequence[str]) -> None:
    """Log what is unwise in a config for its generator, before anything is spent."""
    if uses_embedded(config) and (line := strangers(class_names)):
        log.warning("%s", line)
    if config.generator == "diffusers":
        from ray_synth.generators.settings import advice, family_of

        family, now = family_of(config), filled(config)
        log.info(
            "generator: %s (licence: %s), %d step%s, guidance %g, %d x %d",
            family.name, family.licence or "see its card", now.num_inference_steps,
            "" if now.num_inference_steps == 1 else "s", now.guidance_scale, now.width, now.height,
        )  # fmt: skip
        for line in advice(config, negative_prompt):
            log.warning("%s", line)


def fingerprint(config: GenerationConfig) -> str:
    """A short hex digest of all that decides an image's pixels besides its row."""
    own = getattr(generator_class(config.generator), "fingerprint", None)
    config = filled(config)
    settings = config.model_dump(include={"generator", "generator_kwargs", "model", "revision"})
    settings |= {"width": config.width, "height": config.height, **config.encoding}
    return digest_settings([own(config) if own else settings])


def prompt_tokens(config: GenerationConfig) -> tuple[Callable[[str], int], int]:
    """How the generator's text encoder counts: a function prompt -> tokens, and its context length.

    Start and end tokens are counted, as they take up places. A plug-in that does not say gets 512
    words.
    """
    own = getattr(generator_class(config.generator), "prompt_tokens", None)
    if own is not None:
        return own(config)
    return lambda text: len(text.split()), 512
