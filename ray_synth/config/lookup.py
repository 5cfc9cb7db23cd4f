"""The section that a dotted name leads to."""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def section_at(model: type[BaseModel], location: list[Any]) -> type[BaseModel] | None:
    """The section class that a validation error's location lies in."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            if part not in current.model_fields:
                return None
            current = bare_type(current.model_fields[part].annotation)
        elif get_origin(current) is dict:
            current = bare_type(get_args(current)[1])
        elif get_origin(current) is list:
            current = bare_type(get_args(current)[0])
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def bare_type(annotation: Any) -> Any:
    """`X | None` and `Annotated[X, ...]` as X."""
    if get_origin(annotation) is Annotated:
        return bare_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        return bare_type(options[0]) if len(options) == 1 else annotation
    return annotation
