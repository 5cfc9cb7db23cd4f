"""Indices of remote tars, kept on this machine: without one, a tar is read from one end to the other."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from ray_synth.config import SourceConfig
from ray_synth.data.tar_members import LeftOut
from ray_synth.data.tars import MEMBERS, TarScan, scan_tar

log = logging.getLogger("ray_synth")
FORM = 1  # to be counted up as the reading of tars changes


def known_tar(filesystem: pafs.FileSystem, path: str, source: SourceConfig) -> TarScan:
    """As `scan_tar`; a remote tar of the same size and time as before is not read again."""
    if filesystem.type_name == "local":
        return scan_tar(filesystem, path, source)
    info = filesystem.get_file_info(path)
    if info.mtime_ns is None:
        return scan_tar(filesystem, path, source)
    asked = [FORM, str(source.path), path, info.size, info.mtime_ns, source.label_column]
    kept = _folder() / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()}.arrow"
    try:
        return _read(kept)
    except (OSError, ValueError, KeyError):  # none, or not whole
        found = scan_tar(filesystem, path, source)
    try:
        _write(kept, found)
    except OSError as error:
        log.debug("the index of %s is not kept: %s", path, error)
    return found


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ray-synth" / "tars"


def _read(place: Path) -> TarScan:
    with pa.OSFile(str(place)) as file:
        table = pa.ipc.open_file(file).read_all()
    said = json.loads(table.schema.metadata[b"scan"])
    left_out = LeftOut({reason: (count, name) for reason, count, name in said["left_out"]})
    (images,) = table.replace_schema_metadata().combine_chunks().to_batches() or [
        pa.record_batch([[]] * len(MEMBERS), schema=MEMBERS)
    ]
    return TarScan(images, left_out, said["captions"])


def _write(place: Path, scan: TarScan) -> None:
    """Whole or not at all: others may write the same at the same time."""
    place.parent.mkdir(parents=True, exist_ok=True)
    left_out = [[reason, count, name] for reason, (count, name) in scan.left_out.items()]
    said = json.dumps({"left_out": left_out, "captions": scan.captions})
    schema = MEMBERS.with_metadata({"scan": said})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    descriptor, name = tempfile.mkstemp(dir=place.parent)
    try:
        with (
            os.fdopen(descriptor, "wb") as file,
            pa.ipc.new_file(file, schema, options=options) as out,
        ):
            out.write_batch(scan.images.replace_schema_metadata(schema.metadata))
        os.replace(name, place)
    except BaseException:
        os.unlink(name)
        raise
