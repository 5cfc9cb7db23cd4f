"""Stylised prompts (the paper's SD): the same subject in many art styles, so that shape counts.

The list of styles comes in from YAML (60 of them built in); prompts come out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ray_synth.errors import UserError
from ray_synth.prompting.contexts import Context
from ray_synth.prompting.fitting import SUBJECT, fit_prompt
from ray_synth.storage.texts import read_text


@dataclass(frozen=True)
class Style:
    """An art style.

    Attributes:
        name: unique among the styles, e.g. "oil painting".
        template: a prompt with `{subject}` in it, e.g. "an oil painting of {subject}".
    """

    name: str
    template: str


def load_styles(path: str | Path | None = None) -> list[Style]:
    """The styles of a YAML file, or the built-in ones.

    The file is a list of `{name, template}`.

    Raises:
        UserError: the file is missing or not such a list, a name comes twice, or a template does not
            hold `{subject}` exactly once.
    """
    if path is None:
        text = (resources.files("ray_synth.prompting") / "styles.yaml").read_text("utf-8")
    elif Path(path).is_file():
        text = read_text(path)
    else:
        raise UserError(f"prompting.styles: no such file: {path}")
    where = f"styles file {path or 'styles.yaml'}"
    try:
        entries = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where} is not YAML: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where} must be a list of {{name, template}} with at least one entry")
    styles = [_style(entry, f"{where}, entry {number}") for number, entry in enumerate(entries, 1)]
    seen: set[str] = set()
    for style in styles:
        if style.name.casefold() in seen:
            raise UserError(f"{where}: the name {style.name!r} comes twice; names must differ")
        seen.add(style.name.casefold())
    return styles


def _style(entry: Any, where: str) -> Style:
    if not isinstance(entry, dict) or set(entry) != {"name", "template"}:
        raise UserError(f"{where}: must have exactly the keys name and template, got {entry!r}")
    name, template = entry["name"], entry["template"]
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: the name must be a text, got {name!r}")
    if not isinstance(template, str) or template.count(SUBJECT) != 1:
        raise UserError(f"{where} ({name}): the template must hold {SUBJECT} exactly once")
    return Style(name.strip(), " ".join(template.split()))


def stylized_prompt(
    style: Style, class_name: str, meaning: str, context: Context | None = None, **limit: Any
) -> str:
    """The subject in a style, then as much of its context as the text encoder can read.

    The camera angle is left out: a painting has none.

    Args:
        limit: `count_tokens`, `max_tokens` and `lost` of `fit_prompt`.
    """
    scene = replace(context, camera_angle="") if context else Context()
    return fit_prompt(style.template, class_name, meaning, scene.phrases(), **limit)
