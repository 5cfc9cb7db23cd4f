"""What an image generator is, and how the config names one: diffusers, or a plug-in.

A plug-in is a class `G(config)` with `generate(rows) -> images`. It is named `module:Class`, or by an
entry point of the group `ray_synth.generators` in an installed package.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ray_synth.config import GenerationConfig
from ray_synth.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

GROUP = "ray_synth.generators"
Row = dict[str, Any]


class Failure(str):
    """In place of an image: why it could not be made."""


class ImageGenerator(Protocol):
    """A loaded generator, in one process.

    A class may have, besides: `check(config)` (raises UserError before a cluster is started),
    `fingerprint(config) -> str` (of all that decides the pixels besides the row), and
    `prompt_tokens(config) -> (count, limit)`.
    """

    def __init__(self, config: GenerationConfig) -> None: ...

    def generate(self, rows: list[Row]) -> Sequence[Image.Image | Failure]:
        """One RGB image, or a Failure, for each plan row.

        Each image must depend on its own row alone (prompt, class_name, meaning, seed, ...), not on
        the other rows of the batch. With `generation.reference`, rows carry `reference_image`, the
        encoded bytes of a real image. A method that raises fails rows one by one: see `generate_all`.
        """
        ...


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
    settings |= config.model_dump(include={"width", "height", "image_format", "quality"})
    return digest_settings([own(config) if own else settings])


def digest_settings(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_tokens(config: GenerationConfig) -> tuple[Callable[[str], int], int]:
    """How the generator's text encoder counts: a function prompt -> tokens, and its context length.

    Start and end tokens are counted, as they take up places. A plug-in that does not say gets 512
    words.
    """
    own = getattr(generator_class(config.generator), "prompt_tokens", None)
    if own is not None:
        return own(config)
    return lambda text: len(text.split()), 512


def generate_all(
    generator: ImageGenerator, rows: list[Row]
) -> list[tuple[Image.Image | None, str]]:
    """(image, reason) of each row: one bad row never costs the others.

    Where a batch raises, it is halved until the row that raises is alone. The reason is a `Failure`
    where the generator said it, and a plain text where it raised.

    Raises:
        RuntimeError: every row of a batch raises by itself, so it is not the rows that are bad.
    """
    results = _halving(generator, rows)
    errors = [reason for image, reason in results if raised(image, reason)]
    if len(rows) > 1 and len(errors) == len(rows):
        raise RuntimeError(f"the generator fails on all of {len(rows)} rows: {errors[0]}")
    return results


def _halving(generator: ImageGenerator, rows: list[Row]) -> list[tuple[Image.Image | None, str]]:
    try:
        made = list(generator.generate(rows))
        assert len(made) == len(rows), f"{len(rows)} rows gave {len(made)} images"
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        if len(rows) == 1:
            return [(None, f"{type(error).__name__}: {str(error)[:500]}")]
        middle = len(rows) // 2
        return _halving(generator, rows[:middle]) + _halving(generator, rows[middle:])
    return [(None, Failure(item)) if isinstance(item, str) else (item, "") for item in made]


def raised(image: Image.Image | None, reason: str) -> bool:
    """Whether a row of `generate_all` made its generator raise; another seed would not help it."""
    return image is None and not isinstance(reason, Failure)


def provenance(generator: ImageGenerator, config: GenerationConfig, digest: str) -> str:
    """The `generator` column: JSON of what made an image, as the generator tells it, and its
    fingerprint."""
    facts = {"generator": config.generator, "model": config.model, "revision": config.revision}
    return json.dumps({**facts, **getattr(generator, "provenance", {}), "fingerprint": digest})
