"""A mapping in, a validated and frozen config out; what is wrong is named, all at once."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ray_synth.config.earlier import RETIRED
from ray_synth.config.lookup import section_at
from ray_synth.config.whole import Config
from ray_synth.errors import UserError, did_you_mean
from ray_synth.storage.secrets import holds_secret, redact
from ray_synth.storage.typed_yaml import problems


def parse_config(
    values: dict[str, Any], *, origin: str = "config", model: type[BaseModel] = Config
) -> Any:
    """Validate a mapping as `model`. Raises UserError with one line per problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(*problem, model) for problem in problems(error, model)]
        raise UserError(f"{origin}:\n  " + "\n  ".join(lines)) from None


def _explain(location: list[Any], hint: str, problem: ErrorDetails, model: type[BaseModel]) -> str:
    dotted = ".".join(map(str, location))
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        value = problem["input"]
        shown = not isinstance(value, dict) and not holds_secret(str(value))
        given = f" (given: {value!r})" if shown else ""
        return redact(f"{dotted or model.__name__}: {message}{f' ({hint})' if hint else ''}{given}")
    # A recipe, or another part of a config, is validated on its own: its names lack the first parts.
    part = model is not Config
    retired = [n for n in RETIRED if n == dotted or (part and n.endswith(f".{dotted}"))]
    if retired:
        return f"{dotted}: removed; {RETIRED[retired[0]]}"
    section = section_at(model, location[:-1])
    known = list(section.model_fields) if section else []
    return f"{dotted}: unknown key; {did_you_mean(location[-1], known, known_as='known keys')}"
