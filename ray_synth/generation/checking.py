"""Which parts of a store are whole: a damaged one is named, set aside and so made again.

Sizes come with the listing; of parts that are new or changed since the last look, footers are read, many
at once, and all their pages too while these parts are few. What was found good is remembered beside the
parts, in `checked.parquet`, by size and time.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from ray_synth.errors import shortened
from ray_synth.generation.store import (
    DAMAGED,
    IMAGE_SCHEMA,
    REJECTED,
    SUSPECT,
    ImageStore,
    pack_range,
    part_name,
)
from ray_synth.storage.damage import DamagedFile
from ray_synth.storage.filesystems import at_once

log = logging.getLogger("ray_synth")
CHECKED = "checked.parquet"
SCHEMA = pa.schema([("name", pa.string()), ("size", pa.int64()), ("changed", pa.int64())])
SMALLEST = 12  # bytes of a Parquet file: two marks and a length
READ_WHOLE_BYTES = 1 << 30  # of unknown parts together; of more, footers alone
NEEDED = ("sample_id", "class_index", "image", "accepted", "seed", "prompt")
BY_DIGEST = re.compile(r"part-[0-9a-f]{16}[.-].*")
SHOWN = 8  # in a message
Stamp = tuple[int, int]


def good_parts(store: ImageStore) -> list[str]:
    """Names of the parts that are whole, sorted; the others are named in the log and set aside."""
    stamps, remembered, doubtful = _look(store)
    found = _problems(store, stamps, remembered, doubtful)
    bad = {name: why for name, why in found.items() if why}
    for name in bad:
        set_aside(store, name)
    for name in doubtful - set(bad):
        store.folder.delete(f"{DAMAGED}/{name}{SUSPECT}")
    if bad:
        told = [f"{name} ({why})" for name, why in sorted(bad.items())]
        log.warning(
            "%d damaged file(s) of %s are set aside in %s/, and their images made again: %s",
            len(bad), store.folder.address(), DAMAGED, shortened(told, SHOWN),
        )  # fmt: skip
    gone = {name for name in found if name not in bad and found[name] is None}
    good = {name: stamp for name, stamp in stamps.items() if name not in bad and name not in gone}
    if good != remembered:
        _remember(store, good)
    return sorted(good)


def suspects(store: ImageStore) -> list[str]:
    """What a finished store has lost or finds damaged, as `good_parts` would; nothing is changed."""
    stamps, remembered, doubtful = _look(store)
    found = _problems(store, stamps, remembered, doubtful)
    return sorted({*(remembered.keys() - stamps), *(name for name, why in found.items() if why)})


def set_aside(store: ImageStore, name: str) -> None:
    """Move a part out of the store, into `damaged/`; it may have been packed or moved meanwhile."""
    kept = f"{DAMAGED}/{name}"
    if store.folder.exists(kept):
        kept += f".{uuid.uuid4().hex[:8]}"
    try:
        store.folder.move(name, kept)
    except FileNotFoundError:
        log.debug("%s is gone", name)
    store.folder.delete(f"{DAMAGED}/{name}{SUSPECT}")


def _look(store: ImageStore) -> tuple[dict[str, Stamp], dict[str, Stamp], set[str]]:
    """The stamps of all parts, those that are remembered as good, and parts that a reader doubts."""
    listed = store.folder.stamps()
    stamps = {
        name: stamp
        for name, stamp in listed.items()
        if name.startswith("part-") and name.endswith(".parquet")
    }
    doubtful = set(store.suspected()) & set(stamps) if stamps else set()
    remembered: dict[str, Stamp] = {}
    if CHECKED in listed:
        try:
            table = store.folder.read_table(CHECKED, SCHEMA.names)
            columns = (table[name].to_pylist() for name in SCHEMA.names)
            remembered = {name: (size, at) for name, size, at in zip(*columns, strict=True)}
        except DamagedFile:
            log.debug("%s is damaged: all parts are looked at again", CHECKED)
    return stamps, remembered, doubtful


def _remember(store: ImageStore, good: dict[str, Stamp]) -> None:
    sizes, times = [size for size, _ in good.values()], [at for _, at in good.values()]
    store.folder.write_table(CHECKED, pa.table([list(good), sizes, times], schema=SCHEMA))


def _problems(
    store: ImageStore, stamps: dict[str, Stamp], remembered: dict[str, Stamp], doubtful: set[str]
) -> dict[str, str | None]:
    """What is wrong with each part that is not known to be good: "" nothing, None it is gone."""
    unknown = [name for name in stamps if remembered.get(name) != stamps[name] or name in doubtful]
    whole = sum(stamps[name][0] for name in unknown) <= READ_WHOLE_BYTES
    look: Callable[[str], str | None] = partial(_problem, store, stamps, doubtful, whole)
    return dict(zip(unknown, at_once(look, unknown), strict=True))


def _problem(
    store: ImageStore, stamps: dict[str, Stamp], doubtful: set[str], whole: bool, name: str
) -> str | None:
    size = stamps[name][0]
    if size < SMALLEST:
        return "it is empty" if not size else f"it has {size} bytes"
    try:
        with store.folder.open_table(name) as file:
            wrong = _wrong_footer(file, name)
            return wrong or (_wrong_pages(file, name) if whole or name in doubtful else "")
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        return cause[0][:120] if cause else "it cannot be read"


def _wrong_footer(file: pq.ParquetFile, name: str) -> str:
    schema, metadata = file.schema_arrow, file.metadata
    if lacking := [column for column in NEEDED if column not in schema.names]:
        return f"it holds no images of a run: it has no column {lacking[0]!r}"
    for field in schema:  # a flipped letter or type is none of ours, too
        at = IMAGE_SCHEMA.get_field_index(field.name)
        if at < 0 or IMAGE_SCHEMA.field(at).type != field.type:
            return f"it holds no images of a run: a column {field.name!r:.40} of type {field.type}"
    span = pack_range(name)
    if span is None:
        return "" if metadata.num_rows else "it holds no rows"
    rows = span[1] - span[0]
    if metadata.num_rows != rows:
        return f"it holds {metadata.num_rows} rows, and its name says {rows}"
    numbers = json.loads((metadata.metadata or {}).get(REJECTED, b"null"))
    fits = isinstance(numbers, list) and all(type(n) is int and 0 <= n < rows for n in numbers)
    return "" if fits else "its footer does not say what is rejected"


def _wrong_pages(file: pq.ParquetFile, name: str) -> str:
    """Read all, a row group at a time: pages have checksums, and names a digest of the rows."""
    ids: list[str] = []
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        for column in NEEDED:
            if column != "image" and table[column].null_count:
                return f"a row has no {column}"
        ids += table["sample_id"].to_pylist()
    stem = part_name(ids).removesuffix(".parquet")
    if BY_DIGEST.fullmatch(name) and not name.startswith(stem):
        return "it holds other rows than its name says"
    return ""
