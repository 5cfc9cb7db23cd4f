"""The one reader of labels, for every format: what each row's class is called, and which class it is.

A label is a text or a whole number. Texts are trimmed and brought to Unicode's NFC, since file systems
and spreadsheets change both; case is kept. Numbers count through a source's own names where it has
some (Hugging Face's ClassLabel), and through the run's class names otherwise. Rows without a label
(null, empty, NaN, or a negative number, as hidden test labels are published) are counted.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ray_synth.errors import UserError, did_you_mean, first_line, nearest, shortened

NUMBER = re.compile(r"[0-9]{1,18}")
NEGATIVE = re.compile(r"-[0-9]+")
SHOWN = 5  # labels in one line


class Labels(NamedTuple):
    """Labels of some rows.

    Attributes:
        names: the different ones.
        codes: (rows,) int64 positions in `names`; -1 for a row without a label.
        numbering: what the source calls class 0, 1, ...; () where it does not say.
    """

    names: tuple[str, ...]
    codes: np.ndarray
    numbering: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """What a source holds that its index does not.

    Attributes:
        unlabelled: rows without a label.
        unmatched: rows by label, where it is no class.
        unmapped: rows by label, where `class_map` does not list it.
        passed_over: files that are not read, by what they are.
    """

    unlabelled: int = 0
    unmatched: Mapping[str, int] = field(default_factory=dict)
    unmapped: Mapping[str, int] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def told(self, origin: str, class_names: Sequence[str]) -> list[str]:
        """A sentence for each kind of what is left out.

        Args:
            origin: the setting that names the source: `data.train`.
        """
        lines = []
        if self.unlabelled:
            lines.append(
                f"{origin}: {self.unlabelled:,} images have no label (null, empty or a negative number) "
                "and are left out; a class that is called so is named in data.class_names or class_map"
            )
        if self.unmatched:
            most = sorted(self.unmatched, key=lambda label: (-self.unmatched[label], label))
            some = [_beside(label, self.unmatched[label], class_names) for label in most[:SHOWN]]
            lines.append(
                f"{origin}: {sum(self.unmatched.values()):,} images are left out, since their label is "
                f"no class: {shortened(some + most[SHOWN:], SHOWN, what='labels')}. Rename them, or map "
                "them with class_map"
            )
        if self.unmapped:
            lines.append(
                f"{origin}: class_map leaves out {sum(self.unmapped.values()):,} images of "
                f"{shortened([repr(label) for label in sorted(self.unmapped)], SHOWN)}"
            )
        if self.passed_over:
            kinds = [f"{count:,} {kind}" for kind, count in sorted(self.passed_over.items())]
            lines.append(f"{origin}: not read: {shortened(kinds, 10)}")
        return lines


def _beside(label: str, count: int, class_names: Sequence[str]) -> str:
    """`'cat' (3 images; did you mean 'Cat'?)`."""
    return f"{label!r} ({count:,} images{near_class(label, class_names)})"


def near_class(label: str, class_names: Iterable[str]) -> str:
    """`; did you mean 'Cat'?`, to end a message with; nothing where no class is near."""
    near = closest(label, class_names)
    return f"; did you mean {near!r}?" if near else ""


def closest(label: str, class_names: Iterable[str]) -> str | None:
    """The class whose name is most like a label, case and accents aside; None where none is near."""
    folded = {_folded(name): name for name in class_names}
    found = nearest(_folded(label), folded, cutoff=0.6)
    return folded[found[0]] if found else None


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def tidy(text: str) -> str:
    """Trimmed, and in Unicode's composed form: equal where it looks equal."""
    return unicodedata.normalize("NFC", text).strip().strip("\ufeff").strip()


def label_of(value: Any, names: Sequence[str] = ()) -> str | None:
    """The label that a cell holds; None where it holds none. A negative number stays as it is.

    Args:
        names: what whole numbers stand for.

    Raises:
        UserError: neither a text nor a whole number, or a number that none of `names` has.
    """
    match value:
        case None:
            return None
        case bool():
            return str(value)
        case bytes():
            try:
                value = value.decode()
            except UnicodeDecodeError:
                raise UserError(f"{shortened_value(value)} is not UTF-8 text") from None
        case float() | Decimal():
            if math.isnan(value):
                return None
            if math.isinf(value) or value != int(value):
                raise UserError(f"{value} is no class: a label is a text or a whole number")
            value = int(value)
    if isinstance(value, str):
        return tidy(value) or None
    if not isinstance(value, int):
        raise UserError(
            f"{shortened_value(value)} is a {type(value).__name__}: a label is one text or whole number"
        )
    if names and value >= len(names):
        raise UserError(f"{value} is no class: the {len(names)} classes count from 0")
    return names[value] if names and value >= 0 else str(value)


def shortened_value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def class_label(metadata: dict[bytes, bytes] | None, column: str, origin: str) -> list[str]:
    """The names in Hugging Face's metadata of a Parquet file, where a column is a ClassLabel; else none.

    Raises:
        UserError: the metadata is there and cannot be read.
    """
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return []
    try:
        feature = json.loads(text).get("info", {}).get("features", {}).get(column) or {}
        names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
        if isinstance(names, dict):  # as a dataset card spells it: {"0": "cat", "1": "dog"}
            names = [names[str(number)] for number in range(len(names))]
        if not all(isinstance(name, str) for name in names or []):
            raise TypeError("a class name is no text")
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"{origin}: its Hugging Face metadata cannot be read ({first_line(error)}): write the file "
            "again with the `datasets` library, or without that metadata"
        ) from None
    return list(names or [])


def read_column(
    column: pa.Array | pa.ChunkedArray, origin: str, names: Sequence[str] = ()
) -> Labels:
    """The labels in a column of a table.

    Args:
        origin: the file and the column, for errors.
        names: what whole numbers stand for.

    Raises:
        UserError: it holds something else than texts or whole numbers, or a number out of range; names
            the row.
    """
    names = [tidy(name) for name in names]
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_null(column.type):
        return Labels((), np.full(len(column), -1, dtype=np.int64), tuple(names))
    if pa.types.is_nested(column.type) or pa.types.is_temporal(column.type):
        raise UserError(
            f"{origin} holds values of type {column.type}: a label is one text or whole number; give "
            "label_column the name of a column of those"
        )
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    # A dictionary may hold a null, too.
    codes = np.asarray(column.indices.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)
    labels: list[str | None] = []
    for code, value in enumerate(column.dictionary.to_pylist()):
        try:
            labels.append(label_of(value, names))
        except UserError as error:
            rows = np.flatnonzero(codes == code)
            if not len(rows):  # of a filtered table
                labels.append(None)
                continue
            raise UserError(f"{origin}, row {rows[0]}: {error}") from None
    position: dict[str, int] = {}
    known = [-1 if x is None else position.setdefault(x, len(position)) for x in labels]
    return Labels(tuple(position), np.array([*known, -1])[codes], tuple(names))


def read_texts(texts: Iterable[str | None]) -> Labels:
    """Labels that are texts by their format: names of folders, words in lists and tar files."""
    return read_column(pa.array(list(texts), pa.string()), "")


def joined(parts: Sequence[Labels]) -> Labels:
    """The labels of several pieces of a source, one after the other."""
    position: dict[str, int] = {}
    codes = []
    for part in parts:
        known = [position.setdefault(name, len(position)) for name in part.names]
        codes.append(np.array([*known, -1])[part.codes])
    numberings = {part.numbering for part in parts}
    (numbering,) = numberings if len(numberings) == 1 else ((),)
    merged = np.concatenate(codes) if codes else np.zeros(0, dtype=np.int64)
    return Labels(tuple(position), merged, numbering)


def match_classes(
    labels: Labels,
    origin: str,
    class_names: Sequence[str] | None,
    class_map: Mapping[str, str] | None,
    numbering: Sequence[str] = (),
) -> tuple[tuple[str, ...], np.ndarray, LeftOut]:
    """Labels to classes: by `class_map`, by name, or, where all are numbers, by position.

    Args:
        origin: path of the source, for errors.
        class_names: default: the labels themselves, sorted.
        numbering: names of class 0, 1, ...; default: `class_names`.

    Returns:
        class names; (rows,) int64 class indices, -1 where a row is left out; what is left out.

    Raises:
        UserError: no row has a label, none of the labels is a class, or a number is out of range.
    """
    mapping = {tidy(k): tidy(v) for k, v in class_map.items()} if class_map is not None else None
    chosen = set(class_names or ()) | set(mapping or ())
    rows = np.bincount(labels.codes[labels.codes >= 0], minlength=len(labels.names)).tolist()
    counts = dict(zip(labels.names, rows, strict=True))
    hidden = {name for name in counts if NEGATIVE.fullmatch(name) and name not in chosen}
    unlabelled = len(labels.codes) - sum(rows) + sum(counts.pop(name) for name in hidden)
    if not counts:
        raise UserError(
            f"{origin}: none of its {unlabelled:,} images has a label (all are null, empty or a negative "
            "number, as in the test sets of competitions); take a split that has labels"
        )
    named = {label: mapping.get(label) if mapping is not None else label for label in counts}
    found = {name for name in named.values() if name is not None}
    names = tuple(sorted(found) if class_names is None else class_names)
    position = {name: i for i, name in enumerate(names)}
    if found and not found & set(names) and all(map(NUMBER.fullmatch, found)):
        position = _by_number(found, origin, numbering or names, position)
    classes = {label: position.get(name, -1) for label, name in named.items() if name is not None}
    if max(classes.values(), default=-1) < 0:
        raise UserError(_no_class(origin, found or set(counts), names))
    codes = np.array([classes.get(name, -1) for name in labels.names] + [-1])[labels.codes]
    return (
        names,
        codes,
        LeftOut(
            unlabelled,
            {label: counts[label] for label, at in classes.items() if at < 0},
            {label: counts[label] for label, name in named.items() if name is None},
        ),
    )


def _by_number(
    found: set[str], origin: str, numbering: Sequence[str], position: dict[str, int]
) -> dict[str, int]:
    """Class index of each number."""
    highest = max(found, key=int)
    if int(highest) >= len(numbering):
        raise UserError(
            f"{origin}: its label {highest} is past the last of the {len(numbering)} classes "
            f"({shortened(numbering, 3)}), which count from 0; map labels with class_map"
        )
    return {number: position.get(numbering[int(number)], -1) for number in found}


def _no_class(origin: str, found: set[str], names: Sequence[str]) -> str:
    label = min(found)
    near = closest(label, names)
    hint = did_you_mean(near, [near]) if near else ""
    return (
        f"{origin}: none of its labels ({shortened(sorted(found), 5)}) is a class name "
        f"({shortened(names, 5)}); map them with class_map"
        + (f". {label!r}: {hint}" if hint else "")
    )
