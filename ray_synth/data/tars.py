"""WebDataset tar files: an index of their members, and sets of images written as such files."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from ray_synth.config import SourceConfig
from ray_synth.data.images import EXTENSIONS
from ray_synth.data.labels import label_of
from ray_synth.errors import UserError

MEMBERS = pa.schema(
    [
        ("name", pa.string()),
        ("label", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)
LABELS = ("cls", "txt", "json")
META = re.compile(r"__[^/]*__($|/)")  # what webdataset passes over


def scan_tar(filesystem: pafs.FileSystem, path: str, source: SourceConfig) -> pa.RecordBatch:
    """The images of a tar in their order: `MEMBERS`, with where the bytes of each begin.

    On a local disk only the headers are read; an object store is quicker to read from one end to the
    other than to ask for each header.

    Raises:
        UserError: compressed, not a tar, or a label that is none.
    """
    import webdataset

    local = filesystem.type_name == "local"
    opened = filesystem.open_input_file(path) if local else filesystem.open_input_stream(path)
    rows: list[tuple[str, str | None, int, int]] = []
    with opened as file:
        try:
            # Nothing is decoded by webdataset: its decoders would unpickle .pkl members.
            with tarfile.open(fileobj=file, mode="r:" if local else "r|") as tar:
                for sample in webdataset.tariterators.group_by_keys(_members(tar)):
                    row = _row(sample, path, source)
                    if row is not None:
                        rows.append(row)
        except tarfile.TarError as error:
            raise UserError(
                f"{path} cannot be read as a tar file ({error}); compressed ones have no place from "
                "which an image could be read alone: uncompress it"
            ) from None
    names, labels, offsets, sizes = zip(*rows, strict=True) if rows else ((), (), (), ())
    columns = zip((names, labels, offsets, sizes), MEMBERS.types, strict=True)
    return pa.record_batch([pa.array(c, t) for c, t in columns], schema=MEMBERS)


def _members(tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """Members as webdataset groups them: small labels as bytes, all else as (offset, size)."""
    for info in tar:
        if info.isreg() and not META.match(info.name):
            data: Any = (info.offset_data, info.size)
            if info.name.rsplit(".", 1)[-1].lower() in LABELS:
                found = tar.extractfile(info)
                assert found is not None
                data = found.read()
            yield {"fname": info.name, "data": data, "__url__": ""}
        tar.members = []  # type: ignore[attr-defined]  # or it keeps a record of every one


def _row(
    sample: dict[str, Any], path: str, source: SourceConfig
) -> tuple[str, str | None, int, int] | None:
    place = next((v for k, v in sample.items() if f".{k}".lower().endswith(EXTENSIONS)), None)
    if place is None:
        return None
    key = sample["__key__"]
    return key, _label(sample, path, source.label_column), *place


def _label(sample: dict[str, Any], path: str, column: str) -> str | None:
    """What a sample's .json says, or its .cls or .txt; None where it has none.

    Raises:
        UserError: no JSON, no text, or no label; names the member.
    """
    try:
        if "json" not in sample:
            return label_of(sample.get("cls", sample.get("txt")))
        found = json.loads(sample["json"])
        if not isinstance(found, dict) or column not in found:
            raise UserError(f"its .json has no {column!r}; name another with label_column")
        return label_of(found[column])
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {sample['__key__']}: {error}") from None
