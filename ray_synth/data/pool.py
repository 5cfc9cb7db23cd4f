"""A pool of images that nobody has labelled, in pieces that are read one by one: folders, tars.

In: where it lies. Out: its units, which are small, and the shard that each is once it is opened, on
whatever node reads it. Labels that are there are not looked at.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.fs as pafs

from ray_synth.config import SourceConfig
from ray_synth.data.boundary import reading
from ray_synth.data.images import EXTENSIONS
from ray_synth.data.listing import list_files
from ray_synth.data.sources import Shard, matching
from ray_synth.data.tar_cache import known_tar
from ray_synth.errors import UserError
from ray_synth.storage.filesystems import open_uri

IMAGES_PER_UNIT = 2_048  # of a folder


@dataclass(frozen=True)
class Unit:
    """A tar, or some files of a folder.

    Attributes:
        place: the tar, or the folder that `names` are below.
        names: of the files; None for a tar.
        digest: of what it is made of, by names and sizes.
    """

    source: SourceConfig
    place: str
    digest: str
    names: pa.Array | None = field(default=None, repr=False, compare=False)

    def open(self) -> Shard | None:
        """As what is read, row by row; None where no image is in it. Scans a tar's headers.

        Raises:
            UserError: it cannot be read.
        """
        if self.names is None:
            with reading(self.place):
                members = known_tar(open_uri(self.place)[0], self.place, self.source).images
        else:
            blank = pa.array([""] * len(self.names))
            members = pa.record_batch([self.names, blank], ["name", "label"])
        return Shard(self.source, self.place, 0, len(members), members) if len(members) else None


def pool_units(source: SourceConfig) -> list[Unit]:
    """The units of a pool, in the order of their names.

    Args:
        source: of format imagefolder (all images below `path`, in folders or not) or webdataset.

    Raises:
        UserError: another format, no such place, or no image there.
    """
    with reading(str(source.path)):
        if source.format == "webdataset":
            filesystem, _ = open_uri(str(source.path))
            paths, _ = matching(source, (".tar",))
            infos = filesystem.get_file_info(paths)
            return [Unit(source, info.path, _digest([info.path, str(info.size)])) for info in infos]
        if source.format != "imagefolder":
            raise UserError(
                f"images are retrieved from a folder of images or of tars (--format imagefolder or "
                f"webdataset), not {source.format}"
            )
        filesystem, root = open_uri(str(source.path))
        root = root.rstrip("/")
        if filesystem.get_file_info(root).type != pafs.FileType.Directory:
            raise UserError(f"no such folder: {source.path}")
        files = list_files(filesystem, root).files
        names = pa.array([name for name in files if name.lower().endswith(EXTENSIONS)], pa.string())
    if not len(names):
        raise UserError(f"no images ({', '.join(EXTENSIONS[:4])}, ...) in {source.path}")
    cut = [names[at : at + IMAGES_PER_UNIT] for at in range(0, len(names), IMAGES_PER_UNIT)]
    # Each with names of its own: a slice would be pickled whole.
    own = [pa.array(part.to_pylist(), pa.string()) for part in cut]
    return [Unit(source, root, _digest([root, *part.to_pylist()]), part) for part in own]


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
