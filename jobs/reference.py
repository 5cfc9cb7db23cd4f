"""Writes docs/reference/: settings, commands and Python API, as the code itself says them.

python jobs/reference.py docs/reference
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import typer.main
import yaml
from pydantic_core import PydanticUndefined

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, not another

import ray_synth
from ray_synth.cli.command import app
from ray_synth.config import Config, Section

WRITTEN = "This page is written by `make reference` from the code."
WIDTH = 100
PARTS = re.compile(r"^(Args|Returns|Raises|Attributes|Yields):$", re.M)


# Settings ------------------------------------------------------------------------------------------


def settings() -> str:
    """Every setting with its type, default, mark and description, one table per section."""
    lines = [
        "# Settings", "", WRITTEN, "",
        "A config is a YAML file of these sections; `--set a.b=value` overrides one. A setting marked "
        "*result* changes what comes out: with another value, stages that depend on it must be done "
        "again. One marked *how* may change at any time.",
    ]  # fmt: skip
    for section, places in _sections().items():
        title = ", ".join(f"`{place}`" for place in places if place) or "The config itself"
        doc = " ".join((inspect.getdoc(section) or "").split())
        lines += ["", f"## {title}", "", doc, ""]
        lines += ["| setting | type | default | changes | what it is |", "|---|---|---|---|---|"]
        lines += [_row(section, name) for name in section.model_fields]
    return "\n".join(lines) + "\n"


def _sections() -> dict[type[Section], list[str]]:
    """Each class of settings -> where in a config it stands."""
    found: dict[type[Section], list[str]] = {Config: [""]}

    def visit(section: type[Section], place: str) -> None:
        for name, field in section.model_fields.items():
            here = f"{place}.{name}".lstrip(".")
            for inner, many in _inner(field.annotation):
                known = inner in found
                found.setdefault(inner, []).append(f"{here}.*" if many else here)
                if not known:
                    visit(inner, here)

    visit(Config, "")
    return found


def _inner(annotation: Any, many: bool = False) -> Iterator[tuple[type[Section], bool]]:
    """The classes of settings inside a type, and whether there are several by name."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, many
    many = many or getattr(annotation, "__origin__", None) is dict
    for argument in get_args(annotation):
        yield from _inner(argument, many)


def _row(section: type[Section], name: str) -> str:
    field = section.model_fields[name]
    schema = section.model_json_schema()
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    default = field.get_default(call_default_factory=True)
    nested = list(_inner(field.annotation))
    if default is PydanticUndefined:
        shown = "required"
    elif nested and default is not None:
        shown = "its own" if isinstance(default, Section) else f"`{json.dumps(default)}`"
    else:
        shown = f"`{_value(default)}`"
    cells = (
        f"`{name}`",
        _type(schema["properties"][name], schema),
        shown,
        str(extra.get("changes", "")),
        " ".join((field.description or "").split()),
    )
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _value(value: Any) -> str:
    """As YAML in a line has it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _type(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """`one of a, b`, `whole number, 1 or more`, `list of numbers`: a JSON schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        target = whole["$defs"][name]
        return "section" if target.get("type") == "object" else _type(target, whole)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(part, whole) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        given = schema.get("enum", [schema.get("const")])
        return "one of " + ", ".join(f"`{_value(value)}`" for value in given)
    if "prefixItems" in schema:
        return "[" + ", ".join(_type(part, whole) for part in schema["prefixItems"]) + "]"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), whole)}"
    inner = schema.get("additionalProperties")
    return f"mapping to {_type(inner, whole)}" if isinstance(inner, dict) else _plain(schema)


def _plain(schema: dict[str, Any]) -> str:
    """The same of a value without parts."""
    words = {
        "integer": "whole number", "number": "number", "string": "text", "boolean": "true or false",
        "null": "null", "object": "mapping",
    }  # fmt: skip
    return words.get(str(schema.get("type")), "any") + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    said = (
        ("minimum", "{:g} or more"), ("exclusiveMinimum", "above {:g}"), ("maximum", "{:g} at most"),
        ("exclusiveMaximum", "below {:g}"),
    )  # fmt: skip
    found = [words.format(schema[key]) for key, words in said if key in schema]
    return f" ({', '.join(found)})" if found else ""


# Commands ------------------------------------------------------------------------------------------


def commands() -> str:
    """Every verb with its arguments and options."""
    lines = [
        "# Commands", "", WRITTEN, "",
        "What they have in common (exit codes, JSON, dry runs, completion): [the command](../cli.md).",
    ]  # fmt: skip
    for name, command in _verbs(typer.main.get_command(app), ()):
        said = " ".join((command.help or "").split())
        lines += ["", f"## {name}", "", said, "", "| takes | what it is |", "|---|---|"]
        for param in command.params:
            names = [*param.opts, *param.secondary_opts]
            if param.param_type_name == "argument":
                names = [str(param.metavar or param.name).upper()]
            elif param.name in ("help", "install_completion", "show_completion"):
                continue
            taken = ", ".join(f"`{each}`" for each in names)
            about = " ".join((getattr(param, "help", None) or "").split())
            lines.append(f"| {taken} | {about.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _verbs(group: Any, before: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _verbs(command, (*before, name))
        else:
            yield " ".join((*before, name)), command


# Python --------------------------------------------------------------------------------------------


def api() -> str:
    """The names of `ray_synth.__all__` with their docstrings."""
    lines = [
        "# Python", "", WRITTEN, "",
        "How they are used: [from Python](../python.md). `import ray_synth` alone loads neither Ray "
        "nor torch; the package is typed.",
    ]  # fmt: skip
    for name in sorted(ray_synth.__all__, key=str.lower):
        if not name.startswith("__"):
            lines += _documented(name, getattr(ray_synth, name), "##")
    return "\n".join(lines) + "\n"


def _documented(name: str, thing: Any, level: str) -> list[str]:
    lines = ["", f"{level} {name}", ""]
    if isinstance(thing, property):
        lines += [f"A property. {_prose(inspect.getdoc(thing) or '')}"]
        return lines
    if not (isinstance(thing, type) and issubclass(thing, Section | Exception)):
        lines += ["```python", _signature(name, thing), "```", ""]
    lines.append(_prose(inspect.getdoc(thing) or ""))
    if isinstance(thing, type) and not issubclass(thing, Section | Exception):
        for member, value in vars(thing).items():
            if not member.startswith("_") and (isinstance(value, property) or callable(value)):
                lines += _documented(member, value, level + "#")
    return lines


def _signature(name: str, thing: Callable[..., Any]) -> str:
    """As the code's formatter writes it."""
    signature = inspect.signature(thing)
    if isinstance(thing, type):
        return f"{name}({', '.join(signature.parameters)})"
    words = [_unquoted(str(parameter)) for parameter in signature.parameters.values()]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        words.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    back = _unquoted(f"-> {inspect.formatannotation(signature.return_annotation)}")
    line = f"def {name}({', '.join(words)}) {back}: ..."
    if len(line) <= WIDTH:
        return line
    inner = f"    {', '.join(words)}"
    if len(inner) <= WIDTH:
        return f"def {name}(\n{inner}\n) {back}: ..."
    lines = "".join(f"    {word},\n" for word in words)
    return f"def {name}(\n{lines}) {back}: ..."


def _unquoted(text: str) -> str:
    """Without the quotes of annotations that are strings; defaults keep theirs."""
    return re.sub(r"(?<=[:>] )'([^']+)'", r"\1", text)


def _prose(doc: str) -> str:
    """A docstring as Markdown: its parts as lists, its examples as code."""
    first, *rest = PARTS.split(doc)
    found = [_examples(first.strip())]
    for part, text in zip(rest[::2], rest[1::2], strict=True):
        block = textwrap.dedent(text.strip("\n"))
        block, _, after = block.partition("\n\n")
        entries = re.split(r"\n(?=\S)", block)
        joined = [" ".join(entry.split()) for entry in entries if entry.strip()]
        listed = part != "Returns" and all(": " in entry for entry in joined)
        body = [
            re.sub(r"^([\w, ]+): ", lambda m: f"- `{m[1]}`: ", entry) if listed else entry
            for entry in joined
        ]
        found.append(f"**{part}**\n\n" + "\n".join(body))
        if after.strip():
            found.append(_examples(textwrap.dedent(after).strip()))
    return "\n\n".join(part for part in found if part)


def _examples(text: str) -> str:
    """Lines that are indented are examples."""
    blocks = []
    for block in text.split("\n\n"):
        if ">>>" in block:
            blocks.append("```pycon\n" + textwrap.dedent(block).strip() + "\n```")
        else:
            blocks.append(" ".join(block.split()))
    return "\n\n".join(blocks)


PAGES = {"settings.md": settings, "commands.md": commands, "api.md": api}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
