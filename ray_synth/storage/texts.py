"""Small files that people bring, read as what they should be: text and JSON; errors name the file."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from ray_synth.errors import UserError, first_line
from ray_synth.storage.filesystems import open_uri

POINTER = b"version https://git-lfs"
IS_POINTER = (
    "a Git LFS pointer, not the file itself: run `git lfs pull` in the repository that it is from"
)


def is_pointer(data: bytes | memoryview) -> bool:
    """Whether Git LFS left these bytes in the place of a file."""
    return bytes(data[: len(POINTER)]) == POINTER


def read_text(place: str | Path) -> str:
    """A text file or URI as UTF-8, or UTF-16 with its mark; the mark itself is left out.

    Raises:
        UserError: no such file, it may not be read, or is in another encoding; names file and line.
    """
    filesystem, path = open_uri(str(place))
    try:
        with filesystem.open_input_stream(path) as file:
            data = file.read()
    except FileNotFoundError:
        raise UserError(f"no such file: {place}") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{place} cannot be read ({error.strerror})") from None
    return as_text(data, str(place))


def as_text(data: bytes, origin: str) -> str:
    """As `read_text`, of bytes that were read from `origin`."""
    if is_pointer(data):
        raise UserError(f"{origin} is {IS_POINTER}")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{origin}, line {line}: not UTF-8 text; save it as UTF-8, or, if it is in Latin-1: "
            f"iconv -f latin1 -t utf-8 {origin}"
        ) from None


def read_json(place: str | Path) -> Any:
    """A JSON file. Raises UserError as `read_text` does, and where it is cut off or no JSON."""
    return as_json(read_text(place), str(place))


def as_json(data: bytes | str, origin: str) -> Any:
    """As `read_json`, of what was read from `origin`."""
    text = as_text(data, origin) if isinstance(data, bytes) else data
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        state = "is empty" if not text.strip() else f"is not whole JSON ({first_line(error)})"
        raise UserError(f"{origin} {state}; write or fetch it again") from None
