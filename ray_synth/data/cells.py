"""Images in the cells of a table: their bytes, or the name of a file, which must lie beside the table.

A table comes from strangers: a name in it may lead to any file of this machine, or to any address that
this machine can reach. Only what lies below the source's own folder, on its own file system, is read.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from ray_synth.config import SourceConfig
from ray_synth.data.marks import refusal, with_range
from ray_synth.data.places import Place
from ray_synth.storage.filesystems import open_uri, without_file_scheme
from ray_synth.storage.hub import is_hub_id


def image_bytes(value: Any, source: SourceConfig) -> bytes:
    """The encoded image of a cell: bytes, a name, or Hugging Face's {bytes, path}.

    A cell that names what may not be read, or holds none of these, gives a refusal (see `marks`).
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return with_range(value, source.value_range)
    if not value:
        return b""  # decode_image names it as empty, and the row is set aside
    if not isinstance(value, str):
        return refusal(
            f"the cell holds neither bytes nor a file's name, but a {type(value).__name__}"
        )
    roots = _roots(str(source.path), source.format)
    remote = any("://" in root for root in roots)
    return _remote(value, roots[0], source) if remote else _local(value, roots, source)


def _local(name: str, roots: tuple[str, ...], source: SourceConfig) -> bytes:
    """The file of a name in one of several folders, which no link may lead out of."""
    if "://" in name or "\0" in name:
        return _outside(name, roots)
    places = [
        Place(root, os.path.join(root, name), within=True, value_range=source.value_range)
        for root in roots
    ]
    there = [place for place in places if os.path.lexists(place.path)] or places
    inside = [place for place in there if place.is_within()]
    return inside[0].read() if inside else _outside(name, roots)


def _remote(name: str, root: str, source: SourceConfig) -> bytes:
    inside = name.removeprefix(f"{root}/")
    if "://" in inside or inside.startswith("/") or ".." in inside.split("/"):
        return _outside(name, (root,))
    _, path = open_uri(root)
    return Place(root, f"{path}/{inside}", value_range=source.value_range).read()


def _outside(name: str, roots: tuple[str, ...]) -> bytes:
    return refusal(f"the table names {name[:200]!r}, which is not below {roots[0]}: it is not read")


@lru_cache(maxsize=64)
def _roots(path: str, form: str) -> tuple[str, ...]:
    """Folders in which the files that a source's tables name may lie."""
    path = without_file_scheme(path)
    if form != "huggingface":
        head, _, tail = path.rstrip("/").rpartition("/")
        remote = "://" in path and tail.lower().endswith(".parquet")
        is_file = "*" in tail or remote or os.path.isfile(path)
        return (
            (head or (os.sep if path.startswith("/") else ".")) if is_file else path.rstrip("/"),
        )
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    own = path
    if is_hub_id(path) and not Path(path).exists():
        own = os.path.join(HF_HUB_CACHE, f"datasets--{path.replace('/', '--')}")
    # Archives of a set are unpacked there by the library, which then names the files.
    return own, str(datasets.config.DOWNLOADED_DATASETS_PATH)
