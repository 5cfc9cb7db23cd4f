"""YAML as it was typed: a text setting gets the very text, whatever YAML 1.1 would make of it.

To YAML, `no` and `off` are false, `2024-01-01` is a date, `007` is 7, and ` #2` begins a comment. What a
setting is decides: its annotation in a pydantic model is walked along with the document.
"""

from __future__ import annotations

import logging
import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ray_synth.errors import UserError

log = logging.getLogger("ray_synth")
TAG = "tag:yaml.org,2002:"
COMMENT = re.compile(r"[ \t]+(#\S[^\n]*)")
# YAML 1.1 reads these as octal and as base 60, and takes 1e-8 for a text.
ODD_NUMBER = re.compile(r"[-+]?0[0-9_]+|.*:.*", re.DOTALL)
EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")
# What a setting must take for a scalar of this tag to be kept as YAML reads it.
TAKES = {"null": (type(None),), "bool": (bool,), "int": (int, float), "float": (float,)}


def branches(annotation: Any) -> list[Any]:
    """`X | Annotated[Y, ...] | None` as [X, Y, NoneType]."""
    if get_origin(annotation) is Annotated:
        return branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [leaf for part in get_args(annotation) for leaf in branches(part)]
    return [annotation]


def child(annotation: Any, key: Any) -> Any:
    """What the value at a key, or at a place in a list, may be; Any where that is not known."""
    for branch in branches(annotation):
        if isinstance(branch, type) and issubclass(branch, BaseModel):
            if key in branch.model_fields:
                return branch.model_fields[key].annotation
        elif get_origin(branch) is dict and isinstance(key, str):
            return get_args(branch)[1]
        elif get_origin(branch) in (list, tuple) and isinstance(key, int):
            return get_args(branch)[0]
    return Any


def read_typed(text: str, annotation: Any, origin: str) -> Any:
    """The values of a YAML document, typed by a model's annotations.

    Raises:
        UserError: it is not valid YAML, or a key comes twice in a mapping; names the line.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _Typing(text, origin).visit(node, annotation)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        cut = (
            "; what follows ' #' is a comment to YAML: put the text in quotes"
            if " #" in text
            else ""
        )
        what = error if "\n" in text else getattr(error, "problem", None) or error
        raise UserError(f"{origin} is not valid YAML: {what}{cut}") from None
    finally:
        loader.dispose()


def typed_value(text: str, annotation: Any, origin: str) -> Any:
    """One value as a shell passed it: a text as it is, anything else as YAML.

    A list, a mapping, or a text in quotes of its own is YAML, and must be whole.

    Raises:
        UserError: it is not; or a text begins or ends with a space.
    """
    plain = text.strip()
    takes = branches(annotation)
    is_yaml = plain[:1] in ("[", "{", '"', "'")
    if not is_yaml and (str in takes or any(get_origin(take) is Literal for take in takes)):
        loader = yaml.SafeLoader("")
        node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, plain, (True, False)), plain)
        _Typing("", origin).visit(node, annotation)
        if node.tag == f"{TAG}str" and text != plain:
            raise UserError(
                f"{origin}: the text begins or ends with a space; leave it out, or put quotes inside the "
                f"shell's: '\"{text}\"'"
            )
        return loader.construct_object(node)
    value = read_typed(plain, annotation, origin)
    if is_yaml and (end := _end(plain)) < len(plain):
        raise UserError(
            f"{origin}: {plain[end:].strip()!r} after the value would be lost: put all of it in one pair "
            "of quotes inside the shell's, or leave that out"
        )
    return value


def _end(text: str) -> int:
    """Where the one value of a text ends."""
    node = yaml.compose(text, yaml.SafeLoader)
    return node.end_mark.index if node else len(text)


class _Typing:
    """Sets the tags of a document's nodes by what the settings take."""

    def __init__(self, text: str, origin: str) -> None:
        self.text, self.origin = text, origin
        self._seen: set[int] = set()

    def visit(self, node: yaml.Node, annotation: Any) -> None:
        if id(node) in self._seen:  # an alias, possibly to what it is in
            return
        self._seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            self._scalar(node, annotation)
        elif isinstance(node, yaml.SequenceNode):
            for at, item in enumerate(node.value):
                self.visit(item, child(annotation, at))
        elif isinstance(node, yaml.MappingNode):
            self._mapping(node, annotation)

    def _mapping(self, node: yaml.MappingNode, annotation: Any) -> None:
        known: dict[str, int] = {}
        takes = branches(annotation)
        text_keys = any(_is_section(take) or get_origin(take) is dict for take in takes)
        for at, (key, value) in enumerate(node.value):
            if key.tag == f"{TAG}merge":
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for part in parts:
                    self.visit(part, annotation)
                continue
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused when it is constructed
            if text_keys:
                key.tag = f"{TAG}str"
            if key.value in known:
                raise UserError(
                    f"{self.origin}: {key.value!r} is given twice, in lines {known[key.value]} and "
                    f"{key.start_mark.line + 1}; the first would be lost"
                )
            known[key.value] = key.start_mark.line + 1
            inside = child(annotation, key.value)
            if value.tag == f"{TAG}null" and all(map(_is_section, branches(inside))):
                node.value[at] = (
                    key,
                    yaml.MappingNode(f"{TAG}map", []),
                )  # `tracking:` and nothing below
                continue
            self.visit(value, inside)

    def _scalar(self, node: yaml.ScalarNode, annotation: Any) -> None:
        if node.style is not None or not node.tag.startswith(TAG):
            return
        takes, kind = branches(annotation), node.tag.removeprefix(TAG)
        words = {word for take in takes if get_origin(take) is Literal for word in get_args(take)}
        if Any in takes:
            if EXPONENT.fullmatch(node.value):
                node.tag = f"{TAG}float"
            return
        odd = kind in ("int", "float") and ODD_NUMBER.fullmatch(node.value)
        kept = any(take in takes for take in TAKES.get(kind, ())) and not odd
        if node.value in words or (not kept and (str in takes or odd)):
            node.tag = f"{TAG}str"
        if str in takes and node.tag == f"{TAG}str" and node.end_mark is not None:
            self._tell_comment(node)

    def _tell_comment(self, node: yaml.ScalarNode) -> None:
        cut = COMMENT.match(self.text, node.end_mark.index)
        if cut:
            log.warning(
                "%s, line %d: the value is %r, and %r is a comment to YAML: if it belongs to the value, "
                "put all of it in quotes",
                self.origin, node.end_mark.line + 1, node.value, cut[1].strip(),
            )  # fmt: skip


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def problems(
    error: ValidationError, model: type[BaseModel]
) -> list[tuple[list[Any], str, ErrorDetails]]:
    """(place, what may be there, problem) of each; of a setting of several kinds, what fits best.

    pydantic tries each kind, and puts its name into the place of what is wrong with it.
    """
    found: dict[tuple[Any, ...], list[tuple[list[Any], str, ErrorDetails]]] = {}
    for problem in error.errors():
        place, several, hint = _place(problem["loc"], model)
        key = ("one of", *several) if several is not None else (len(found),)
        found.setdefault(key, []).append((place, hint, problem))
    best = []
    for alike in found.values():
        alike.sort(key=lambda each: (-len(each[0]), each[2]["type"].endswith("_type")))
        deepest = len(alike[0][0])
        same_kind = [each for each in alike if len(each[0]) == deepest]
        best += same_kind if deepest > len(alike[-1][0]) else same_kind[:1]
    return best


def _place(
    location: tuple[Any, ...], model: type[BaseModel]
) -> tuple[list[Any], tuple[Any, ...] | None, str]:
    """A problem's place without the names of kinds; that of the setting which takes several kinds, if it
    lies in one; and that setting's description."""
    place: list[Any] = []
    several, hint, annotation, chosen = None, "", model, False
    for part in location:
        kinds = [kind for kind in branches(annotation) if kind is not type(None)]
        if len(kinds) > 1 and not chosen:
            several, chosen = tuple(place) if several is None else several, True
            continue
        if several is None:
            field = getattr(kinds[0], "model_fields", {}).get(part)
            hint = (field.description or "") if field else ""
        annotation, chosen = child(annotation, part), False
        place.append(part)
    return place, several, hint if several is not None else ""
