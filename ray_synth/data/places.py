"""Single encoded images read by themselves, in any process: whole files, or stretches of larger ones.

A `Place` is a few strings and numbers, so that a batch of images travels to the process that decodes it
as the places that they are read from.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ray_synth.data.marks import ValueRange, refusal, with_range
from ray_synth.storage.filesystems import AT_ONCE, open_uri, patiently, without_file_scheme

if TYPE_CHECKING:
    import pyarrow as pa


# What is wrong with one file, and not with the storage.
OF_ONE_FILE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENXIO,
}  # fmt: skip


class Readable(Protocol):
    """An encoded image that is elsewhere."""

    def read(self) -> bytes: ...


class Place(NamedTuple):
    """An image in a file.

    Attributes:
        uri: path or URI of the source: its file system holds the file.
        path: the file, as the file system knows it.
        offset, size: of the stretch; a size of -1 is the whole file.
        within: the file must lie below `uri`, where links lead as well.
        value_range: goes with the bytes, see `marks`.
    """

    uri: str
    path: str
    offset: int = 0
    size: int = -1
    within: bool = False
    value_range: ValueRange | None = None

    def read(self) -> bytes:
        """Its bytes; a storage that does not answer is tried again.

        A picture's own file that is gone, forbidden, or outside gives a refusal (see `marks`): it is set
        aside, and the others are read.
        """
        local = "://" not in self.uri or self.uri.startswith("file://")
        try:
            data = self._read_local() if local else patiently(self._read_remote)
        except OSError as error:
            its_own = isinstance(error, FileNotFoundError) or error.errno in OF_ONE_FILE
            if not its_own or self.size >= 0:  # a file of many images: no mishap of one
                raise
            return refusal(f"cannot be read ({error.strerror or 'there is no such file'})")
        except ValueError:  # of a NUL, or half a character
            return refusal(f"{self.path!a} is no name of a file")
        return with_range(data, self.value_range)

    def is_within(self) -> bool:
        """Whether the file lies below the source's own folder, when links are followed."""
        return _below(os.path.realpath(self.path), self.uri)

    def _read_local(self) -> bytes:
        # Without waiting: a pipe may have no writer.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            if self.within and not _below(_opened_path(descriptor, self.path), self.uri):
                return refusal(
                    f"it is a link to outside of {self.uri}: not followed without follow_links: true"
                )
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return refusal("it is no regular file")
            file.seek(self.offset)
            return file.read(self.size)

    def _read_remote(self) -> bytes:
        if self.size >= 0:
            return _opened(self.uri, self.path).read_at(self.size, self.offset)
        filesystem, _ = open_uri(self.uri)
        with filesystem.open_input_file(self.path) as file:
            return file.read()


def _opened_path(descriptor: int, path: str) -> str:
    """Where links have led; Linux says so in one call, others look at each folder on the way."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return os.path.realpath(path)


def _below(real: str, uri: str) -> bool:
    root = _real_root(uri)
    return real == root or real.startswith(root.rstrip("/") + "/")


@lru_cache(maxsize=1024)
def _real_root(uri: str) -> str:
    return os.path.realpath(without_file_scheme(uri))


@lru_cache(maxsize=1024)
def _opened(uri: str, path: str) -> pa.NativeFile:
    """A file of which stretches are read; opening one asks an object store for its size."""
    return open_uri(uri)[0].open_input_file(path)


def read_all(images: Iterable[bytes | Readable]) -> Iterator[bytes]:
    """Encoded images in their order, `AT_ONCE` of them read at a time; bytes are passed on."""
    images = list(images)
    if all(isinstance(image, bytes) for image in images):
        yield from images  # type: ignore[misc]
        return
    waiting: deque[bytes | Future[bytes]] = deque()
    for image in images:
        waiting.append(image if isinstance(image, bytes) else _readers().submit(image.read))
        if len(waiting) > 2 * AT_ONCE:
            yield _bytes(waiting.popleft())
    while waiting:
        yield _bytes(waiting.popleft())


def _bytes(found: bytes | Future[bytes]) -> bytes:
    return found if isinstance(found, bytes) else found.result()


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="read")
