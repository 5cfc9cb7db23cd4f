"""How the config names a generator: diffusers, or a plug-in (`generators/protocol.py`).

A plug-in is named `module:Class`, or by an entry point of the group `ray_synth.generators` in an
installed package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable

from ray_synth.config import GenerationConfig
from ray_synth.errors import UserError
from ray_synth.generators.protocol import ImageGenerator, digest_settings

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


def fingerprint(config: GenerationConfig) -> str:
    """A short hex digest of all that decides an image's pixels besides its row."""
    own = getattr(generator_class(config.generator), "fingerprint", None)
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
