"""Image-to-image: a real image of the class guides each synthetic one.

In: a text-to-image pipeline, and plan rows with the encoded bytes of a real image. Out: its
image-to-image twin, which shares its weights, and the arguments of that twin's call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from ray_synth.data.images import decode_image
from ray_synth.errors import UserError

if TYPE_CHECKING:
    from ray_synth.config import GenerationConfig


def image_to_image(pipeline: Any) -> Any:
    """The image-to-image pipeline of the same family, made of the same parts; nothing is copied.

    To be called before the parts are offloaded, spread or moved: hooks belong to one pipeline.

    Raises:
        UserError: diffusers has none that starts from a noised image.
    """
    from diffusers import AutoPipelineForImage2Image

    try:
        twin = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError:
        twin = None
    if twin is None or not {"image", "strength"} <= set(_parameters(twin)):
        raise UserError(
            f"generation.reference needs image-to-image, and diffusers has none for "
            f"{type(pipeline).__name__}; leave generation.reference out, or take a Stable Diffusion, "
            "SDXL, SD 3 or Flux model"
        )
    twin.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return twin


def reference_steps(num_inference_steps: int, strength: float) -> int:
    """How many of the steps are run: the last `strength` of the schedule.

    Raises:
        UserError: less than one.
    """
    steps = min(int(num_inference_steps * strength), num_inference_steps)
    if steps < 1:
        raise UserError(
            f"generation.reference.strength {strength} of {num_inference_steps} steps is less than "
            "one step: raise it, or generation.num_inference_steps, until their product is at least 1"
        )
    return steps


def prepare_references(
    images: Iterable[Image.Image], *, width: int, height: int
) -> list[Image.Image]:
    """RGB images of (width, height), scaled to cover it and cut evenly at the edges."""
    size = (width, height)
    return [ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS) for image in images]


def reference_arguments(
    pipeline: Any, rows: Sequence[dict[str, Any]], config: GenerationConfig
) -> dict[str, Any]:
    """Keyword arguments of an image-to-image call, besides the prompts and the generators.

    Args:
        pipeline: from `image_to_image`.
        rows: plan rows; `reference_image` is the encoded bytes of a real image.
        config: with `reference` set, and nothing left open.

    Raises:
        UserError: a row has no readable reference, or the strength is less than one step.
    """
    assert config.reference is not None
    assert config.num_inference_steps is not None
    assert config.width is not None
    assert config.height is not None
    reference_steps(config.num_inference_steps, config.reference.strength)
    size = {"width": config.width, "height": config.height}
    images = prepare_references((decode_image(row["reference_image"]) for row in rows), **size)
    taken = {name: value for name, value in size.items() if name in _parameters(pipeline)}
    return {"image": images, "strength": config.reference.strength, **taken}


def _parameters(pipeline: Any) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters
