"""What is assumed of a data set's greys, said once: their type, black and white, and what a few hold."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ray_synth.data.dataset import Index
from ray_synth.data.greys import Greys
from ray_synth.data.images import MAX_PIXELS, grey_values
from ray_synth.data.marks import ValueRange
from ray_synth.data.places import read_all
from ray_synth.data.sources import read_rows
from ray_synth.errors import UserError

log = logging.getLogger("ray_synth")
LOOKED_AT = 8  # images of a data set, most of which need no more than their headers
DIM = 1 / 4  # of white, and no pixel is brighter: they hold fewer bits than their type, it seems


class Seen(NamedTuple):
    """Deep greys among the images that were looked at: their kind, how many, and their values."""

    greys: Greys
    images: int
    least: float
    most: float


def tell_greys(origin: str, index: Index, *, max_pixels: int = MAX_PIXELS) -> None:
    """Say how a data set's deep greys are read, from a few of its images; nothing of other sets.

    Args:
        origin: the setting that names the source: `data.train`.

    Raises:
        UserError: their type does not say which values are black and white, and no value_range does.
    """
    found: dict[Greys, list[tuple[float, float]]] = {}
    looked_at = 0
    for data in _few(index):
        looked_at += 1
        try:
            seen = grey_values(data, max_pixels=max_pixels)
        except UserError:
            continue  # it will be set aside, and named
        if seen is not None:
            greys, least, most = seen
            found.setdefault(greys, []).append((least, most))
    given = index.shards[0].source.value_range if index.shards else None
    for greys, values in found.items():
        least, most = min(v[0] for v in values), max(v[1] for v in values)
        _tell(origin, Seen(greys, len(values), least, most), given, alone=len(values) == looked_at)


def _few(index: Index) -> Iterator[bytes]:
    """A few images, spread over the set; of one row group where it gives no single images."""
    if not len(index):
        return
    at = np.unique(np.linspace(0, len(index) - 1, LOOKED_AT).astype(int))
    if all(index.shards[shard].addressable for shard in index.shard[at]):
        yield from read_all(index.locate(int(i)) for i in at)
        return
    first = index.shard[0]
    rows = index.row[index.shard == first][:LOOKED_AT].tolist()
    for _, data in read_rows(index.shards[first], rows):
        yield data


def _tell(origin: str, seen: Seen, given: ValueRange | None, *, alone: bool) -> None:
    kind, own = seen.greys.kind, seen.greys.own_range
    holds = f"{seen.images} of them hold values from {seen.least:g} to {seen.most:g}"
    if given is not None:
        _say(
            f"{origin}: {kind}: {given[0]:g} is black and {given[1]:g} white, by value_range; {holds}"
        )
        return
    known = own is not None and (own[0] <= seen.least and seen.most <= own[1])
    if not known:
        text = (
            f"{origin}: {kind} do not say which values are black and white: {holds}; give "
            f"{origin}.value_range: [BLACK, WHITE]"
        )
        if alone:
            raise UserError(text)
        _warn(text)
        return
    assert own is not None
    text = f"{origin}: {kind}: {own[0]:g} is black and {own[1]:g} white, by their type; {holds}"
    if seen.most >= own[1] * DIM:
        _say(text)
        return
    likely = 2 ** max(1, int(seen.most).bit_length()) - 1 if own[1] > 1 else seen.most
    _warn(
        f"{text}, so all of them will be nearly black: where white is less, give "
        f"{origin}.value_range: [0, {likely:g}]"
    )


@lru_cache(maxsize=1024)
def _say(text: str) -> None:
    """Once in a process: a study opens many runs."""
    log.info(text)


@lru_cache(maxsize=1024)
def _warn(text: str) -> None:
    log.warning(text)
