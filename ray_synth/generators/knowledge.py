"""What the embedded models know: digits, and little else. Said before anything is spent on others."""

from __future__ import annotations

from collections.abc import Sequence

from ray_synth.config import GenerationConfig

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
AROUND = {"the", "a", "an", "digit", "digits", "number", "numeral", "handwritten"}
HUB_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def is_digit(class_name: str) -> bool:
    """Whether a class is one that the embedded models were made for: `7`, seven, digit_7."""
    words = class_name.casefold().replace("_", " ").replace("-", " ").split()
    named = [word for word in words if word not in AROUND]
    return bool(named) and all(
        word in DIGITS or (word.isdecimal() and len(word) == 1) for word in named
    )


def strangers(class_names: Sequence[str]) -> str | None:
    """A warning where classes are none that the embedded models know; None where all are digits."""
    unknown = [name for name in class_names if not is_digit(name)]
    if not unknown:
        return None
    named = ", ".join(repr(name[:40]) for name in unknown[:3])
    more = f" and {len(unknown) - 3:,} more classes" if len(unknown) > 3 else ""
    return (
        f"the embedded models know digits and little else: their images of {named}{more} will hardly "
        "show them, and a classifier gains nothing from such images. Take a model of the hub "
        f"(generation.model: {HUB_MODEL}; it needs a GPU, here or on a Ray cluster: cluster.address), or "
        "a server that makes images (generation.generator: endpoint); docs/generation.md has both. "
        "Nothing has been spent yet"
    )


def uses_embedded(config: GenerationConfig) -> bool:
    """Whether the embedded text-to-image model makes the images."""
    return config.generator == "diffusers" and config.model == "embedded"
