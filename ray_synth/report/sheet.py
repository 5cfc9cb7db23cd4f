"""A few images of each class and kind, picked by id and not by looks, and a sheet of them.

The image store in; example rows for the page, and a contact sheet as one PNG, out.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from ray_synth.config import Kind
from ray_synth.data.images import decode_image, encode_image
from ray_synth.errors import UserError
from ray_synth.generation.cost import reason_kind
from ray_synth.generation.selection import choose, read_chosen, scan
from ray_synth.generation.store import ImageStore
from ray_synth.storage.folder import Folder

KINDS: tuple[str, ...] = get_args(Kind)
LABELS = ["sample_id", "class_index", "class_name", "kind", "accepted"]
SHOWN = ["sample_id", "meaning", "style", "prompt", "seed", "clip_score", "image"]
GAP = 12  # between the blocks of two kinds
HEADER = 22
LABEL = 120
CAPTION_LINES, CAPTION_LINE, CAPTION_FONT = 3, 12, 9  # under a picture that has a caption
SLICE = ["class_index", "class_name", "kind", "accepted", "reject_reason", "image"]


def choose_examples(
    folder: Folder, *, per_class: int = 12, max_classes: int = 20, max_rows: int = 50_000
) -> list[dict[str, Any]]:
    """Accepted images of a run, by class, then kind, then id.

    The ids are digests, so the first few are a fair sample: the same ones whatever order the images
    were made in, and no better than the rest.

    Args:
        per_class: images of each class, at most, shared evenly by the kinds that occur.
        max_classes: where there are more classes, this many are taken at even distances.
        max_rows: a larger store is judged by about so many of its rows, those of whole parts.
    """
    store = ImageStore(folder.child("images"))
    seen = 0
    cells: dict[tuple[int, str], list[tuple[str, str]]] = {}
    names: dict[int, str] = {}
    for part, table in store.every(LABELS):
        for row in table.to_pylist():
            if row["accepted"]:
                names[row["class_index"]] = row["class_name"]
                cell = cells.setdefault((row["class_index"], row["kind"]), [])
                cell.append((row["sample_id"], part))
        seen += table.num_rows
        if seen >= max_rows:
            break
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
        for row in (r for t in store.groups(part, SHOWN, ids=chosen) for r in t.to_pylist()):
            _, index, kind = chosen[row["sample_id"]]
            found[row["sample_id"]] = {
                **row,
                "class_index": index,
                "class_name": names[index],
                "kind": kind,
            }
    return [found[sample_id] for sample_id in chosen]


def choose_refused(
    folder: Folder, *, most: int = 12, max_rows: int = 50_000
) -> list[dict[str, Any]]:
    """Images that failed a check, as many of each reason as can be, the first ids of each.

    Args:
        max_rows: as in `choose_examples`.
    """
    store = ImageStore(folder.child("images"))
    reasons: dict[str, list[tuple[str, str]]] = {}
    seen = 0
    for part, table in store.every(["sample_id", "reject_reason"]):
        for row in table.filter(pc.not_equal(table["reject_reason"], "")).to_pylist():
            reasons.setdefault(reason_kind(row["reject_reason"]), []).append(
                (row["sample_id"], part)
            )
        seen += table.num_rows
        if seen >= max_rows:
            break
    ordered = [sorted(set(found)) for _, found in sorted(reasons.items())]
    turns = itertools.zip_longest(*ordered)
    chosen = dict([item for turn in turns for item in turn if item is not None][:most])
    columns = ["sample_id", "class_name", "prompt", "reject_reason", "image"]
    found = {
        row["sample_id"]: row
        for part in sorted(set(chosen.values()))
        for table in store.groups(part, columns, ids=chosen)
        for row in table.to_pylist()
    }
    return [found[sample_id] for sample_id in chosen if sample_id in found]


def kinds_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds that occur, in the order of the method: plain, contextual, stylized."""
    present = {row["kind"] for row in rows}
    return [kind for kind in KINDS if kind in present]


def contact_sheet(rows: Sequence[dict[str, Any]], *, columns: int, cell: int = 64) -> Image.Image:
    """One row per class, one block of `columns` images per kind, with labels.

    Args:
        rows: `class_name`, `kind` and `image` (encoded bytes) of each; classes in order of first
            appearance. Images beyond `columns` in a block are left out, unreadable ones stay blank.
            A `caption`, where one has it, is written small under its picture.
        columns: images in each block.
        cell: side of an image in pixels.

    Returns:
        RGB, `sheet_size(...)` large; without rows, a sheet that says so.
    """
    kinds = kinds_of(rows)
    # By index as well: two classes of a data set may share a name.
    classes = list(dict.fromkeys((row.get("class_index"), row["class_name"]) for row in rows))
    under = CAPTION_LINES * CAPTION_LINE if any(row.get("caption") for row in rows) else 0
    size = sheet_size(len(classes), len(kinds), columns=columns, cell=cell, under=under)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    if not rows:
        draw.text((6, 4), "no images", fill="black", font=_font(13))
        return sheet
    lefts = {kind: LABEL + at * (columns * cell + GAP) for at, kind in enumerate(kinds)}
    for kind, left in lefts.items():
        draw.text((left + 2, 4), _fit(kind, columns * cell), fill="#555555", font=_font(12))
    for at, (_, name) in enumerate(classes):
        middle = HEADER + at * (cell + under) + cell // 2
        draw.text((6, middle), _fit(name, LABEL - 12), fill="black", font=_font(13), anchor="lm")
    filled: dict[tuple[int, str], int] = {}
    for row in rows:
        line = classes.index((row.get("class_index"), row["class_name"]))
        column = filled.get((line, row["kind"]), 0)
        if row["kind"] not in lefts or column >= columns:
            continue
        filled[line, row["kind"]] = column + 1
        picture = thumbnail(row["image"], cell, enlarge=True)
        left, top = lefts[row["kind"]] + column * cell, HEADER + line * (cell + under)
        if picture is not None:
            middle_of = left + (cell - picture.width) // 2, top + (cell - picture.height) // 2
            sheet.paste(picture, middle_of)
        for number, text in enumerate(_wrap(row.get("caption") or "", cell - 4)):
            place = left + 2, top + cell + number * CAPTION_LINE
            draw.text(place, text, fill="#a02020", font=_font(CAPTION_FONT))
    return sheet


def sheet_of(
    folder: Folder,
    *,
    class_names: Collection[str] | None = None,
    kinds: Collection[str] | None = None,
    style: str | None = None,
    sample_ids: Collection[str] | None = None,
    rejected: bool | None = None,
    limit: int = 240,
    columns: int | None = None,
    cell: int = 96,
) -> Image.Image:
    """A contact sheet of any slice of a run's images; why one was rejected is written under it.

    Args:
        folder: the run's directory.
        class_names, kinds, sample_ids: any of these; None or empty: all.
        style: only this style.
        rejected: only rejected images, or only accepted ones; None: both.
        limit: at most so many images, the first ones of the plan: those are balanced over classes.
            Named images are all drawn.
        columns: images side by side in a block; default: 12 shared by the kinds that occur. A class
            with more goes on in the next line.
        cell: side of an image in pixels.

    Raises:
        UserError: nothing fits; says which values occur.
    """
    if columns is not None and columns < 1:
        raise UserError(f"columns {columns}: give 1 or more")
    chosen = choose(
        scan(folder),
        class_names=class_names,
        kinds=kinds,
        styles=[style] if style else None,
        sample_ids=sample_ids,
        rejected=rejected,
        limit=None if sample_ids else limit,
    )
    rows = [row for part in read_chosen(folder, chosen, SLICE) for row in part]
    rows.sort(key=lambda row: (row["class_index"], row["kind"], row["sample_id"]))
    columns = columns or max(1, 12 // len(kinds_of(rows)))
    filled: Counter[tuple[int, str]] = Counter()
    lines = []
    for row in rows:
        cells = row["class_index"], row["kind"]
        line = filled[cells] // columns
        filled[cells] += 1
        # A further line of a class is a class of its own to the sheet, without a name.
        name = row["class_name"] if line == 0 else ""
        index = row["class_index"], line
        lines.append({**row, "class_index": index, "class_name": name, "caption": _why(row)})
    lines.sort(key=lambda row: row["class_index"])
    return contact_sheet(lines, columns=columns, cell=cell)


def _why(row: dict[str, Any]) -> str:
    """What the checks said of an image; empty where they said nothing."""
    return row["reject_reason"] or ("" if row["accepted"] else "rejected")


def sheet_size(
    classes: int, kinds: int, *, columns: int, cell: int = 64, under: int = 0
) -> tuple[int, int]:
    """(width, height) of a contact sheet in pixels; `under` is the room for captions in a line."""
    blocks = kinds * columns * cell + max(0, kinds - 1) * GAP
    return LABEL + blocks, HEADER + classes * (cell + under)


def write_contact_sheet(folder: Folder, name: str = "report/contact_sheet.png") -> str:
    """Write a run's contact sheet as PNG; its address."""
    rows = choose_examples(folder, per_class=12, max_classes=50)
    columns = 12 // max(1, len(kinds_of(rows)))
    folder.write_bytes(name, encode_image(contact_sheet(rows, columns=columns)))
    return folder.address(name)


def thumbnail(data: bytes, side: int, *, enlarge: bool = False) -> Image.Image | None:
    """An encoded image as RGB with its longer side at most (or, with `enlarge`, just) `side`.

    None where the bytes are not a readable image.
    """
    try:
        picture = decode_image(data)
    except UserError:
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


def _wrap(text: str, width: int) -> list[str]:
    """A caption in at most `CAPTION_LINES` lines, the last one cut where more is left."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < CAPTION_LINES - 1:
        count = 1
        while (
            count < len(words)
            and _font(CAPTION_FONT).getlength(" ".join(words[: count + 1])) <= width
        ):
            count += 1
        lines.append(_fit(" ".join(words[:count]), width, CAPTION_FONT))
        words = words[count:]
    return [*lines, _fit(" ".join(words), width, CAPTION_FONT)] if words else lines


def _fit(text: str, width: int, size: int = 13) -> str:
    """The text on one line, cut with an ellipsis where it is too wide."""
    text = " ".join(text.split())
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
