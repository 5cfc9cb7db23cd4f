"""What the user knows of class names: synonyms, and what each is a kind of. From the config or a file."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence

from ray_synth.config import ClassInfo
from ray_synth.data.labels import near_class, tidy
from ray_synth.errors import UserError, shortened
from ray_synth.storage.texts import read_text
from ray_synth.storage.typed_yaml import read_typed

log = logging.getLogger("ray_synth")
COLUMNS = ("name", "synonyms", "parent")


def read_class_info(
    given: dict[str, ClassInfo] | str | None, class_names: Sequence[str]
) -> dict[str, ClassInfo]:
    """By class name, what is known of it; names that are no class are told, and left out.

    Args:
        given: the mapping, or the path or URI of a YAML file of it, or of a CSV file with the columns
            `name`, `synonyms` (parted by `;`) and `parent`.

    Raises:
        UserError: no such file, it is of another form, or it names no class at all.
    """
    if not given:
        return {}
    origin = given if isinstance(given, str) else "data.class_info"
    found = _read(given) if isinstance(given, str) else given
    found = {tidy(name): info for name, info in found.items()}
    unknown = sorted(set(found) - set(class_names))
    if unknown:
        hint = near_class(unknown[0], class_names)
        said = f"{origin} names {shortened(unknown, 5)}, which is no class{hint}"
        if len(unknown) == len(found):
            raise UserError(said)
        log.warning("%s", said)
    return {name: found[name] for name in class_names if name in found}


def _read(place: str) -> dict[str, ClassInfo]:
    from pydantic import TypeAdapter, ValidationError

    text = read_text(place)
    if place.lower().endswith(".csv"):
        return _rows(text, place)
    values = read_typed(text, dict[str, ClassInfo], place)
    try:
        return TypeAdapter(dict[str, ClassInfo]).validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise UserError(
            f"{place}: {where}: {problem['msg']}; give {{synonyms: [...], parent: ...}} by class name"
        ) from None


def _rows(text: str, place: str) -> dict[str, ClassInfo]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = [tidy(name) for name in reader.fieldnames or ()]
    if "name" not in names or not set(names) <= set(COLUMNS):
        raise UserError(f"{place} has the columns {names}: give {', '.join(COLUMNS)}")
    found: dict[str, ClassInfo] = {}
    for row in reader:
        cells = {
            tidy(key): tidy(value)
            for key, value in row.items()
            if isinstance(key, str) and isinstance(value, str)
        }
        name = cells.get("name", "")
        if not name or name in found:
            what = f"{name!r} comes twice" if name else "there is no name"
            raise UserError(f"{place}, line {reader.line_num}: {what}")
        synonyms = [tidy(part) for part in cells.get("synonyms", "").split(";")]
        found[name] = ClassInfo(
            synonyms=[part for part in synonyms if part], parent=cells.get("parent") or None
        )
    return found
