"""What goes with an encoded image wherever its bytes go: the range of its values, or why it is not read.

Images travel as bytes: through Ray's store, shared memory, the run's tables and the service. A mark in
front of the bytes reaches each place that decodes, and `images.decode_image` alone reads it.
"""

from __future__ import annotations

import json
from typing import NamedTuple

MAGIC = b"\x00ray-synth-image "  # no image format begins so
LONGEST = 4096  # bytes of a mark: they may come from strangers
ValueRange = tuple[float, float]


class Marked(NamedTuple):
    """An encoded image and what its mark says.

    Attributes:
        data: the image's own bytes; empty where it was refused.
        value_range: the values of its pixels that are black and white.
        refused: why it was not read.
    """

    data: bytes
    value_range: ValueRange | None = None
    refused: str | None = None


def with_range(data: bytes, value_range: ValueRange | None) -> bytes:
    """An encoded image with the range of its data set; without one, or refused, as it is."""
    if value_range is None or data.startswith(MAGIC):
        return data
    return MAGIC + json.dumps(list(value_range)).encode() + b"\n" + data


def refusal(why: str) -> bytes:
    """What stands for an image that is not read: decoding it gives `why`, so that it is set aside."""
    return MAGIC + json.dumps(why[: LONGEST // 8]).encode() + b"\n"


def unmarked(data: bytes) -> Marked:
    """Raises ValueError for a mark that is none of ours."""
    if not data.startswith(MAGIC):
        return Marked(data)
    end = data.index(b"\n", len(MAGIC), LONGEST)
    said = json.loads(data[len(MAGIC) : end])
    if isinstance(said, str):
        return Marked(b"", refused=said)
    low, high = map(float, said)
    return Marked(data[end + 1 :], (low, high))
