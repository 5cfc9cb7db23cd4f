"""How a finished file comes to its place: by a rename, its bytes and its name forced out to the disk."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow.fs as pafs


def place(temporary: str, path: str, *, durable: bool = True) -> None:
    """Put a finished local file in its place, its bytes first and then its name on the disk."""
    if durable:
        sync(temporary)
    os.replace(temporary, path)
    if durable:
        sync(os.path.dirname(path))


def sync(path: str) -> None:
    """Force a file, or the names in a folder, out to the disk, where the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS):
            raise
    finally:
        os.close(handle)


def move_file(filesystem: pafs.FileSystem, source: str, to: str) -> None:
    """Put a finished file in its place. A copy within a storage appears whole, as a rename does."""
    try:
        filesystem.move(source, to)
    except NotImplementedError:  # Azure without a hierarchical namespace
        filesystem.copy_file(source, to)
        filesystem.delete_file(source)
