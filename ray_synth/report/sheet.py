"""A few images of each class and kind, picked by id and not by looks, and a sheet of them.

The image store in; example rows for the page, and a contact sheet as one PNG, out.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from ray_synth.config import Kind
from ray_synth.data.images import decode_image, encode_image
from ray_synth.generation.store import ImageStore
from ray_synth.storage import Folder

KINDS: tuple[str, ...] = get_args(Kind)
LABELS = ["sample_id", "class_index", "class_name", "kind", "accepted"]
SHOWN = ["sample_id", "meaning", "style", "prompt", "seed", "clip_score", "image"]
GAP = 12  # between the blocks of two kinds
HEADER = 22
LABEL = 120


def choose_examples(
    folder: Folder, *, per_class: int = 12, max_classes: int = 20, max_parts: int = 2000
) -> list[dict[str, Any]]:
    """Accepted images of a run, by class, then kind, then id.

    The ids are digests, so the first few are a fair sample: the same ones whatever order the images
    were made in, and no better than the rest.

    Args:
        per_class: images of each class, at most, shared evenly by the kinds that occur.
        max_classes: where there are more classes, this many are taken at even distances.
        max_parts: a larger store is judged by this many of its parts.
    """
    store = ImageStore(folder.child("images"))
    parts = store.parts()[:max_parts]
    if not parts:
        return []
    with ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(lambda name: store.read(name, LABELS), parts))
    cells: dict[tuple[int, str], list[tuple[str, str]]] = {}
    names: dict[int, str] = {}
    for part, table in zip(parts, tables, strict=True):
        for row in table.to_pylist():
            if row["accepted"]:
                names[row["class_index"]] = row["class_name"]
                cell = cells.setdefault((row["class_index"], row["kind"]), [])
                cell.append((row["sample_id"], part))
    shown = _spread(sorted(names), max_classes)
    per_kind = max(1, per_class // max(1, len({kind for _, kind in cells})))
    chosen = {
        sample_id: (part, index, kind)
        for index in shown
        for kind in KINDS
        for sample_id, part in sorted(set(cells.get((index, kind), [])))[:per_kind]
    }
    found: dict[str, dict[str, Any]] = {}
    for part in sorted({part for part, _, _ in chosen.values()}):
        table = store.read(part, SHOWN)
        mask = pa.array([sample_id in chosen for sample_id in table["sample_id"].to_pylist()])
        for row in table.filter(mask).to_pylist():
            _, index, kind = chosen[row["sample_id"]]
            found[row["sample_id"]] = {
                **row,
                "class_index": index,
                "class_name": names[index],
                "kind": kind,
            }
    return [found[sample_id] for sample_id in chosen]


def kinds_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds that occur, in the order of the method: plain, contextual, stylized."""
    present = {row["kind"] for row in rows}
    return [kind for kind in KINDS if kind in present]


def contact_sheet(rows: Sequence[dict[str, Any]], *, columns: int, cell: int = 64) -> Image.Image:
    """One row a class, one block of `columns` images a kind, with labels.

    Args:
        rows: `class_name`, `kind` and `image` (encoded bytes) of each; classes in order of first
            appearance. Images beyond `columns` in a block are left out, unreadable ones stay blank.
        columns: images in each block.
        cell: side of an image in pixels.

    Returns:
        RGB, `sheet_size(...)` large; without rows, a sheet that says so.
    """
    kinds = kinds_of(rows)
    # By index as well: two classes of a data set may share a name.
    classes = list(dict.fromkeys((row.get("class_index"), row["class_name"]) for row in rows))
    size = sheet_size(len(classes), len(kinds), columns=columns, cell=cell)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    if not rows:
        draw.text((6, 4), "no images", fill="black", font=_font(13))
        return sheet
    lefts = {kind: LABEL + at * (columns * cell + GAP) for at, kind in enumerate(kinds)}
    for kind, left in lefts.items():
        draw.text((left + 2, 4), _fit(kind, columns * cell), fill="#555555", font=_font(12))
    for at, (_, name) in enumerate(classes):
        middle = HEADER + at * cell + cell // 2
        draw.text((6, middle), _fit(name, LABEL - 12), fill="black", font=_font(13), anchor="lm")
    filled: dict[tuple[int, str], int] = {}
    for row in rows:
        line = classes.index((row.get("class_index"), row["class_name"]))
        column = filled.get((line, row["kind"]), 0)
        if row["kind"] not in lefts or column >= columns:
            continue
        filled[line, row["kind"]] = column + 1
        picture = thumbnail(row["image"], cell, enlarge=True)
        if picture is not None:
            left = lefts[row["kind"]] + column * cell + (cell - picture.width) // 2
            top = HEADER + line * cell + (cell - picture.height) // 2
            sheet.paste(picture, (left, top))
    return sheet


def sheet_size(classes: int, kinds: int, *, columns: int, cell: int = 64) -> tuple[int, int]:
    """(width, height) of a contact sheet in pixels."""
    blocks = kinds * columns * cell + max(0, kinds - 1) * GAP
    return LABEL + blocks, HEADER + classes * cell


def write_contact_sheet(folder: Folder, name: str = "report/contact_sheet.png") -> str:
    """Write a run's contact sheet as PNG; its address."""
    rows = choose_examples(folder, per_class=12, max_classes=50)
    columns = 12 // max(1, len(kinds_of(rows)))
    folder.write_bytes(name, encode_image(contact_sheet(rows, columns=columns)))
    return f"{folder.uri.rstrip('/')}/{name}"


def thumbnail(data: bytes, side: int, *, enlarge: bool = False) -> Image.Image | None:
    """An encoded image as RGB with its longer side at most (or, with `enlarge`, just) `side`.

    None where the bytes are no readable image.
    """
    try:
        picture = decode_image(data)
    except ValueError:
        return None
    scale = side / max(picture.size)
    if scale < 1 or enlarge:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        # Tiny images keep their pixels where that can be even; the rest is resampled.
        even = scale == int(scale)
        way = Image.Resampling.NEAREST if even else Image.Resampling.LANCZOS
        picture = picture.resize(size, way)
    return picture


def _spread(items: list[int], count: int) -> list[int]:
    """At most `count` items at even distances."""
    if len(items) <= count:
        return items
    return [items[at * len(items) // count] for at in range(count)]


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    """DejaVu Sans as matplotlib ships it: it knows more scripts than PIL's own font."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def _fit(text: str, width: int) -> str:
    """The text on one line, cut with an ellipsis where it is too wide."""
    text = " ".join(text.split())
    font = _font(13)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
