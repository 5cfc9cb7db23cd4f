"""What of a config decides a plan, as `plan_tables` takes it; and what does not fit in a prompt."""

from __future__ import annotations

from typing import Any

from ray_synth.config import Config
from ray_synth.errors import UserError
from ray_synth.generators.registry import fingerprint, prompt_tokens
from ray_synth.prompting.contexts import Context
from ray_synth.prompting.fitting import SUBJECT
from ray_synth.prompting.styles import load_styles

FOR_THE_SUBJECT = 8  # tokens that a style leaves at the least


def plan_settings(config: Config) -> dict[str, Any]:
    """The settings of `plan_tables`. Raises UserError as `prompt_limit`."""
    count_tokens, _ = prompt_tokens(config.generation)
    return {
        "mix": {str(kind): share for kind, share in config.prompting.mix.items()},
        "styles": load_styles(config.prompting.styles),
        "negative_prompt": config.prompting.negative_prompt,
        "fingerprint": fingerprint(config.generation),
        "seed": config.seed,
        "count_tokens": count_tokens,
        "max_tokens": prompt_limit(config),
    }


def prompt_limit(config: Config) -> int:
    """Tokens that a prompt may have. Raises UserError where what the user gave cannot fit."""
    count_tokens, limit = prompt_tokens(config.generation)
    length = count_tokens(config.prompting.negative_prompt)
    if length > limit:
        raise UserError(
            f"prompting.negative_prompt is too long: {length} tokens, and the text encoder of "
            f"{config.generation.model!r} reads {limit}; shorten it"
        )
    for style in load_styles(config.prompting.styles) if config.prompting.styles else ():
        length = count_tokens(style.template.replace(SUBJECT, ""))
        if length + FOR_THE_SUBJECT > limit:
            raise UserError(
                f"prompting.styles: {style.name!r} alone takes {length} tokens, and the text encoder of "
                f"{config.generation.model!r} reads {limit}: nothing is left for the subject; shorten it"
            )
    return limit


def read_contexts(answer: dict[str, Any]) -> list[tuple[Context, str]]:
    """The scenes that the service wrote for a class, each with its source."""
    return [(Context(**item["context"]), item["source"]) for item in answer.get("contexts", [])]
