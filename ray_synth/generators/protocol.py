"""What an image generator is: a class `G(config)` with `generate(rows) -> images`, and how it is called.

In: plan rows. Out: images, or for each row the reason why there is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ray_synth.config import GenerationConfig
from ray_synth.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Row = dict[str, Any]
# What a plug-in is given where the config leaves it open.
PLUGIN: dict[str, Any] = {
    "width": 512,
    "height": 512,
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
}


class Failure(str):
    """In place of an image: why it could not be made."""


class ImageGenerator(Protocol):
    """A loaded generator, in one process.

    A class may have, besides: `check(config)` and `check_plan(config, num_images)` (raise UserError
    before a cluster is started), `filled(config) -> config` (its own size, steps and guidance for what
    is None; else 512 x 512, 20 and 7.5), `fingerprint(config) -> str` (of all that decides the pixels
    besides the row), and `prompt_tokens(config) -> (count, limit)`.
    """

    def __init__(self, config: GenerationConfig) -> None: ...

    def generate(self, rows: list[Row]) -> Sequence[Image.Image | Failure]:
        """One RGB image, or a Failure, for each plan row.

        Each image must depend on its own row alone (prompt, class_name, meaning, seed, ...), not on
        the other rows of the batch. With `generation.reference`, rows carry `reference_image`, the
        encoded bytes of a real image. A method that raises fails rows one by one: see `generate_all`.
        """
        ...


def generate_all(
    generator: ImageGenerator, rows: list[Row]
) -> list[tuple[Image.Image | None, str]]:
    """(image, reason) of each row: one bad row never costs the others.

    Where a batch raises, it is halved until the row that raises is alone. The reason is a `Failure`
    where the generator said it, and a plain text where it raised.

    Raises:
        RuntimeError: every row of a batch raises by itself, so it is not the rows that are bad.
        UserError: so it is, and the generator calls it the user's mistake.
    """
    results = _halving(generator, rows)
    errors = [reason for image, reason in results if raised(image, reason)]
    if len(rows) > 1 and len(errors) == len(rows):
        mistake = errors[0].removeprefix(f"{UserError.__name__}: ")
        if mistake != errors[0]:
            raise UserError(mistake)
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


def plugin_size(config: GenerationConfig) -> tuple[int, int]:
    """(width, height) for a plug-in."""
    return config.width or PLUGIN["width"], config.height or PLUGIN["height"]


def provenance(
    generator: ImageGenerator, config: GenerationConfig, digest: str, **others: Any
) -> str:
    """The `generator` column: JSON of what made an image, as the generator tells it, its fingerprint,
    and other facts."""
    facts = {"generator": config.generator, "model": config.model, "revision": config.revision}
    own = getattr(generator, "provenance", {})
    return json.dumps({**facts, **own, "fingerprint": digest, **others})


def digest_settings(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
