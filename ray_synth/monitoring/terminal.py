"""Lines that fit a terminal, and whether it may have colours."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from typing import Any

COLUMN = re.compile(r".*\S\s{2,}(?=\S)")  # what stands before the last column of a line


def fitted(text: str, stream: Any) -> str:
    """Text for a stream: where that is a terminal, no line is wider, but for a word that alone is, such
    as a path. Lines are broken between words, and go on under their last column."""
    if not stream.isatty():
        return text
    return "\n".join(broken(text, shutil.get_terminal_size().columns))


def broken(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters where words allow it."""
    found: list[str] = []
    for line in text.split("\n"):
        before = COLUMN.match(line)
        indent = before.end() if before and before.end() <= width // 2 else 2
        found += textwrap.wrap(
            line, width, subsequent_indent=" " * indent, break_long_words=False,
            break_on_hyphens=False, replace_whitespace=False,
        ) or [""]  # fmt: skip
    return found


def no_color() -> bool:
    """Whether the user wants none: https://no-color.org."""
    return bool(os.environ.get("NO_COLOR"))
