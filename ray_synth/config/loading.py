"""A YAML file and `a.b=c` in, a config out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_synth.config.parsing import parse_config
from ray_synth.config.recipes import merge_recipe
from ray_synth.config.whole import Config
from ray_synth.errors import UserError
from ray_synth.storage.texts import read_text
from ray_synth.storage.typed_yaml import child, read_typed, typed_value


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML), and validate.

    Raises:
        UserError: the file is missing or not a mapping, or a key or value is wrong; the message names
            each one and, for a misspelt key, the nearest that exists.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no config file at {path}; `ray-synth init --images DIR` writes one")
    text = read_text(path)
    if not text.strip("\0 \n"):
        raise UserError(
            f"{path} is empty, as a full disk leaves files; `ray-synth init --images DIR` writes one"
        )
    values = read_typed(text, Config, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings; `ray-synth init --images DIR` writes one")
    for override in overrides or []:
        _apply(values, override)
    merge_recipe(values)
    return parse_config(values, origin=str(path))


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override!r}: expected a.b=value")
    node: Any = values
    annotation: Any = Config
    left = key.strip()
    while True:
        part = _first_part(node, left)
        annotation, left = child(annotation, part), left[len(part) + 1 :]
        if not left:
            break
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {part} is a value, not a section")
    node[part] = typed_value(text, annotation, f"--set {override!r}")


def _first_part(node: dict[str, Any], key: str) -> str:
    """`data` of `data.train`; a name that is there already may hold dots: a test set `v2.0`."""
    there = [name for name in node if isinstance(name, str) and f"{key}.".startswith(f"{name}.")]
    return max(there, key=len, default=key.partition(".")[0])
