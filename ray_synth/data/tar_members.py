"""The members of a tar file, as far as they are whole: what is damaged, cut off or foreign is counted."""

from __future__ import annotations

import re
import struct
import tarfile
from collections.abc import Collection, Iterator
from typing import Any

from ray_synth.errors import UserError

Stretch = tuple[int, int]  # offset, size
MAX_KEPT_BYTES = 1_000_000  # of a label
MAX_DAMAGED_BLOCKS = 200_000  # 100 MB, looked through in seconds for the next member
ABOUT_THE_NEXT = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
META = re.compile(r"__[^/]*__($|/)")  # what webdataset passes over
LEFTOVER = re.compile(r"(^|/)(__MACOSX/|\.[^/]+$)")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gz, bz2, xz, zst


class LeftOut(dict[str, tuple[int, str]]):
    """What is not read, by the reason: how many, and the first of them."""

    def note(self, reason: str, name: str, count: int = 1) -> None:
        before, first = self.get(reason, (0, name))
        self[reason] = before + count, first


class Header(tarfile.TarInfo):
    """A member's header; a subclass for each tar notes what tarfile passes over.

    Attributes:
        begun: a header was read.
        damaged: blocks that are no header, since the last one that is.
        closed: zeros have followed, the mark of a tar's end.
    """

    begun = closed = False
    damaged = 0

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Header:
        try:
            found = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError:
            if not cls.begun and buf.startswith(COMPRESSED):
                raise UserError("it is compressed") from None
            if any(buf):
                cls.damaged += 1
                cls.closed = False
                if not cls.begun or cls.damaged > MAX_DAMAGED_BLOCKS:
                    raise tarfile.ReadError("no header of a member where one should be") from None
            cls.closed |= bool(buf)
            raise
        if found.size < 0:
            raise tarfile.ReadError("a member of less than 0 bytes")
        if found.type in ABOUT_THE_NEXT and found.size > MAX_KEPT_BYTES:  # it is read whole
            raise tarfile.ReadError(f"a name or header of {found.size:,} bytes")
        cls.begun, cls.closed = True, False
        return found


def members(
    file: Any,
    path: str,
    size: int | None,
    mode: Any,
    *,
    keep: Collection[str],
    left_out: LeftOut,
) -> Iterator[tuple[str, Stretch | bytes]]:
    """(name, where its bytes are) of the regular members of a tar, without what systems leave behind.

    Args:
        size: of the file, where it is known.
        mode: of tarfile: `r:`, or `r|` where the file cannot be sought in.
        keep: endings of small members whose bytes are given in place of where they are.
        left_out: what is not given is counted there.

    Raises:
        UserError: compressed.
    """

    class Noted(Header):
        """Of this tar."""

    end, begin = 0, -1
    endings = tuple(f".{ending}" for ending in keep)
    try:
        # Zeros are passed over: tars are joined by `cat`, and a damaged header hides only its member.
        with tarfile.open(
            fileobj=file, mode=mode, tarinfo=Noted, ignore_zeros=True, encoding="utf-8"
        ) as tar:
            for info in tar:
                if Noted.damaged:
                    left_out.note("damaged stretches", f"before {info.name!a}")
                    Noted.damaged = 0
                if info.offset_data <= begin:
                    raise tarfile.ReadError("a member that begins before the last one")
                begin = info.offset_data
                if size is not None and begin + info.size > size:
                    raise tarfile.ReadError(f"{info.name!a} is cut off")
                end = begin + info.size
                if _is_data(info, left_out):
                    kept = info.size <= MAX_KEPT_BYTES and info.name.lower().endswith(endings)
                    yield info.name, _bytes(tar, info) if kept else (begin, info.size)
                tar.members = []  # type: ignore[attr-defined]  # or it keeps a record of every one
        if Noted.damaged or not Noted.closed:
            raise tarfile.ReadError("its end is missing")
    except UserError as error:
        raise UserError(
            f"{path} cannot be read as a tar file ({error}); compressed ones have no place from which an "
            "image could be read alone: uncompress it"
        ) from None
    except (tarfile.TarError, ValueError, OverflowError, EOFError, struct.error) as error:
        left_out.note("tars that are cut off or damaged", f"from byte {end:,}: {error}")


def _is_data(info: tarfile.TarInfo, left_out: LeftOut) -> bool:
    """Whether a member may be one of a sample; what a user may miss is counted."""
    if info.isdir() or LEFTOVER.search(info.name) or META.match(info.name):
        return False
    reason = None
    try:
        info.name.encode()
    except UnicodeEncodeError:
        reason = "members whose name is not UTF-8"
    if not info.isreg() or info.issparse():
        reason = "links, devices and files with holes"
    elif "." not in info.name.rpartition("/")[2]:
        reason = "other files"
    if reason:
        left_out.note(reason, ascii(info.name))
    return reason is None


def _bytes(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    found = tar.extractfile(info)
    assert found is not None
    return found.read()
