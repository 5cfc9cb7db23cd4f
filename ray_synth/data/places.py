"""Single encoded images read by themselves, in any process: whole files, or stretches of larger ones.

A `Place` is a few strings and numbers, so that a batch of images travels to the process that decodes it
as the places that they are read from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ray_synth.data.boundary import Unreadable, reading
from ray_synth.errors import UserError
from ray_synth.storage.filesystems import AT_ONCE, open_uri, patiently

if TYPE_CHECKING:
    import pyarrow as pa


class Readable(Protocol):
    """An encoded image that is elsewhere."""

    def read(self) -> bytes: ...


class Place(NamedTuple):
    """An image in a file.

    Attributes:
        uri: path or URI of the source: its file system holds the file.
        path: the file, as the file system knows it.
        offset, size: of the stretch; a size of -1 is the whole file.
    """

    uri: str
    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Its bytes; a storage that does not answer is tried again.

        Raises:
            UserError: the file is gone, or may not be read.
        """
        with reading(self.path):
            if "://" not in self.uri:
                with open(self.path, "rb", buffering=0) as file:
                    file.seek(self.offset)
                    return file.read(self.size)
            return patiently(self._read_remote)

    def _read_remote(self) -> bytes:
        if self.size >= 0:
            return _opened(self.uri, self.path).read_at(self.size, self.offset)
        filesystem, _ = open_uri(self.uri)
        with filesystem.open_input_file(self.path) as file:
            return file.read()


@lru_cache(maxsize=1024)
def _opened(uri: str, path: str) -> pa.NativeFile:
    """A file of which stretches are read; opening one asks an object store for its size."""
    return open_uri(uri)[0].open_input_file(path)


def read_all(images: Iterable[bytes | Readable]) -> Iterator[bytes]:
    """Encoded images in their order, `AT_ONCE` of them read at a time; bytes are passed on.

    One that is gone or may not be read comes as `Unreadable`, which is set aside as what cannot be
    decoded is.
    """
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
    if isinstance(found, bytes):
        return found
    try:
        return found.result()
    except UserError as error:
        return Unreadable(str(error))


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="read")
