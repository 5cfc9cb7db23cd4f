"""A pool of other real images: a folder of pictures at any depth, or WebDataset tars; no labels are read.

In: a place. Out: an `Index` of one nameless class, whose images are read as those of any other.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from ray_synth.config import DataConfig, SourceConfig
from ray_synth.data.boundary import reading
from ray_synth.data.dataset import Index, setting_of
from ray_synth.data.images import EXTENSIONS
from ray_synth.data.listing import list_files
from ray_synth.data.sources import Shard, chunked, matching
from ray_synth.data.tar_cache import known_tar
from ray_synth.errors import UserError
from ray_synth.storage.filesystems import at_once, open_uri, without_file_scheme


def load_pool(place: str, *, follow_links: bool = False) -> Index:
    """All images of a folder, of the tars in it, or of the tars that a `*` names.

    Raises:
        UserError: there is no such place, it cannot be read, or holds no image.
    """
    with reading(place):
        shards = _tars(place)
        if not shards:
            shards = _pictures(place, follow_links)
    counts = [
        shard.members.num_rows if shard.members is not None else shard.stop for shard in shards
    ]
    total = sum(counts)
    return Index(
        ("",),
        tuple(shards),
        np.repeat(np.arange(len(counts)), counts),
        np.concatenate([np.arange(count) for count in counts]),
        np.zeros(total, dtype=np.int64),
    )


def _tars(place: str) -> list[Shard]:
    source = SourceConfig(format="webdataset", path=place)
    filesystem, path = open_uri(place)
    if not place.endswith(".tar") and "*" not in place:
        found = list_files(filesystem, path.rstrip("/")).files if _is_folder(place) else []
        if not any(name.lower().endswith(".tar") for name in found):
            return []
    paths, _ = matching(source, (".tar",))
    scans = at_once(lambda path: known_tar(filesystem, path, source), paths)
    shards = [
        Shard(source, path, 0, scan.images.num_rows, scan.images)
        for path, scan in zip(paths, scans, strict=True)
        if scan.images.num_rows
    ]
    if not shards:
        raise UserError(f"no image in the {len(paths):,} tar files of {place}")
    return shards


def _pictures(place: str, follow_links: bool) -> list[Shard]:
    if not _is_folder(place):
        raise UserError(f"no such folder: {place}; give a folder of pictures, or of tar files")
    source = SourceConfig(format="imagefolder", path=place, follow_links=follow_links)
    filesystem, root = open_uri(place)
    root = root.rstrip("/")
    names = [n for n in list_files(filesystem, root).files if n.lower().endswith(EXTENSIONS)]
    if not names:
        raise UserError(f"no image ({', '.join(EXTENSIONS[:4])}, ...) and no tar file in {place}")
    return chunked(source, root, [(name, "") for name in names])


def _is_folder(place: str) -> bool:
    filesystem, path = open_uri(place)
    return filesystem.get_file_info(path).type.name == "Directory"


def pool_digest(pool: Index) -> str:
    """A digest of the names of all images, in their order."""
    digest = hashlib.sha256()
    for shard in pool.shards:
        digest.update(f"{shard.place}\n".encode())
        if shard.members is not None:
            digest.update("\n".join(shard.members["name"].to_pylist()).encode())
    return digest.hexdigest()[:16]


def refuse_tests(place: str, data: DataConfig) -> None:
    """Raises UserError where a pool holds a test set's place, or lies in one; none is opened."""
    mine = _whole(place)
    for name, source in {"in_domain": data.test, **data.ood}.items():
        if source.format in ("digits", "uci_digits", "huggingface") or not source.path:
            continue
        theirs = _whole(source.path)
        if f"{mine}/".startswith(f"{theirs}/") or f"{theirs}/".startswith(f"{mine}/"):
            raise UserError(
                f"the pool {place} and {setting_of(name)} ({source.path}) lie in one another: test "
                "images would be trained on; give a pool without them"
            )


def _whole(place: str) -> str:
    """Without its last part, where that is a pattern; links of this machine followed."""
    place = without_file_scheme(place)
    if "*" in place or place.endswith(".tar"):
        place = place.rpartition("/")[0] or "."
    return place.rstrip("/") if "://" in place else os.path.realpath(os.path.expanduser(place))
