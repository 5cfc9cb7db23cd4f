"""WebDataset tar files: an index of their images, read past whatever is damaged or foreign in them.

Members belong together by their name up to its first dot, as the `webdataset` library has it, and may
stand in any order. Where a picture's own name has more dots, the label that shares most of them is its.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from ray_synth.config import SourceConfig
from ray_synth.data.images import EXTENSIONS
from ray_synth.data.tar_members import LeftOut, Stretch, members
from ray_synth.errors import UserError, first_line, shortened
from ray_synth.storage.filesystems import patiently

log = logging.getLogger("ray_synth")
MEMBERS = pa.schema(
    [
        ("name", pa.string()),
        ("label", pa.string()),  # "": it has none
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)
LABELS = ("cls", "json", "txt")  # by their weight: img2dataset keeps captions as txt
UNLABELLED = "images without a label"
Sample = dict[str, Stretch | bytes]  # what follows the first dot, in lower case -> place, or label
Row = tuple[str, str, int, int]


class TarScan(NamedTuple):
    """What one tar holds.

    Attributes:
        images: `MEMBERS`, with where the bytes of each image begin.
        left_out: what is not read.
        captions: images whose label is a `.txt` beside a `.json` that has none.
    """

    images: pa.RecordBatch
    left_out: LeftOut
    captions: int = 0


def scan_tar(filesystem: pafs.FileSystem, path: str, source: SourceConfig) -> TarScan:
    """The images of a tar, in the order in which their samples begin.

    On a local disk only the headers are read; an object store is quicker to read from one end to the
    other than to ask for each header.

    Raises:
        UserError: compressed, or it may not be read.
    """
    local = filesystem.type_name == "local"

    def scan() -> TarScan:
        left_out = LeftOut()
        opened = filesystem.open_input_file(path) if local else filesystem.open_input_stream(path)
        with opened as file:
            size = filesystem.get_file_info(path).size
            found = members(
                file, path, size, "r:" if local else "r|", keep=LABELS, left_out=left_out
            )
            samples = _samples(found, left_out)
        return _images(samples, source.label_column, left_out)

    try:
        return patiently(scan, remote=not local)
    except (PermissionError, FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None


def tell_left_out(source: SourceConfig, scans: dict[str, TarScan]) -> None:
    """Say once for a data set what its tars hold that is not read.

    Args:
        scans: by the tar's path.

    Raises:
        UserError: no image is left, or none has a label.
    """
    total = LeftOut()
    for path, scan in scans.items():
        for reason, (count, name) in scan.left_out.items():
            total.note(reason, f"{path}: {name}", count)
    told = [f"{count:,} {reason} ({name})" for reason, (count, name) in sorted(total.items())]
    text = shortened(told, 10, joint="; ")
    images = sum(scan.images.num_rows for scan in scans.values())
    if not images:
        raise UserError(
            f"{source.path}: no image ({', '.join(EXTENSIONS[:4])}, ...) in its tar files; left out: "
            f"{text or 'nothing'}"
        )
    if total.get(UNLABELLED, (0, ""))[0] == images:
        raise UserError(
            f"{source.path}: none of the {images:,} images in its tar files has a label, which is "
            f"NAME.cls, {source.label_column!r} in NAME.json (label_column names another key), or "
            f"NAME.txt beside NAME.jpg; left out: {text}"
        )
    if told:
        log.warning("%s: left out: %s", source.path, text)
    captions = sum(scan.captions for scan in scans.values())
    if captions:
        log.warning(
            "%s: the labels of %d images are the texts in .txt, as their .json has no %r: where they are "
            "captions, name the key of the class in label_column",
            source.path, captions, source.label_column,
        )  # fmt: skip


def _samples(found: Iterator[tuple[str, Stretch | bytes]], left_out: LeftOut) -> dict[str, Sample]:
    """Samples by the name up to its first dot."""
    samples: dict[str, Sample] = {}
    for name, data in found:
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        sample = samples.setdefault(f"{folder}{slash}{stem}", {})
        suffix = suffix.lower()
        if suffix in sample:
            left_out.note("members whose name comes again", name)
        else:
            sample[suffix] = data
    return samples


def _images(samples: dict[str, Sample], column: str, left_out: LeftOut) -> TarScan:
    rows: list[Row] = []
    captions = 0
    for key, sample in samples.items():
        pictures = _pictures(key, sample, left_out)
        if not pictures:
            labelled = any(_ending(suffix) in LABELS for suffix in sample)
            left_out.note("samples without an image" if labelled else "other files", key)
            continue
        rows += _labelled(key, sample, pictures, column, left_out)
        sure = _label(sample, "", column, LABELS[:2])
        captions += "json" in sample and sure != _label(sample, "", column)
    columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    arrays = [pa.array(values, t) for values, t in zip(columns, MEMBERS.types, strict=True)]
    return TarScan(pa.record_batch(arrays, schema=MEMBERS), left_out, captions)


def _ending(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _pictures(key: str, sample: Sample, left_out: LeftOut) -> dict[str, Stretch]:
    """Images of a sample by what stands between the first and the last dot; one of each."""
    found: dict[str, Stretch] = {}
    for suffix, data in sample.items():
        if f".{_ending(suffix)}" not in EXTENSIONS or isinstance(data, bytes):
            continue
        stem = suffix.rpartition(".")[0]
        if stem in found:
            left_out.note("images that are there in another format, too", f"{key}.{suffix}")
        else:
            found[stem] = data
    return found


def _labelled(
    key: str, sample: Sample, pictures: dict[str, Stretch], column: str, left_out: LeftOut
) -> Iterator[Row]:
    """`MEMBERS` of a sample. A label is for one image: its namesake, or else the first below it."""
    taken = set(pictures)
    for stem, place in pictures.items():
        parts = stem.split(".") if stem else []
        above = [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
        labels = ((name, _label(sample, name, column)) for name in above)
        owner, label = next(((n, text) for n, text in labels if text is not None), (stem, None))
        name = f"{key}.{owner}" if owner else key
        if owner != stem:
            if owner in taken:
                left_out.note("images beside the one that a label is for", f"{key}.{stem}")
                continue
            taken.add(owner)
        if label is None:
            left_out.note(UNLABELLED, name)
        yield name, label or "", *place


def _label(sample: Sample, stem: str, column: str, kinds: tuple[str, ...] = LABELS) -> str | None:
    """The text of a label; None where there is none, or it is neither a text nor a whole number."""
    for kind in kinds:
        data = sample.get(f"{stem}.{kind}" if stem else kind)
        if isinstance(data, bytes) and (text := _text(data, kind, column)):
            return text
    return None


def _text(data: bytes, kind: str, column: str) -> str | None:
    try:
        value: Any = data.decode("utf-8-sig")
        if kind == "json":
            value = json.loads(value)
            value = value.get(column) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, str | int) else None
