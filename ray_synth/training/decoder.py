"""Encoded images to batches of pixels, in a thread or in processes; corrupt ones are set aside.

In: rows `{image: encoded bytes, class_index, sample_id or image_id}`. Out: `Batch`.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ray_synth.data.images import decode_image
from ray_synth.errors import UserError
from ray_synth.training.augmentation import ImageTransform

log = logging.getLogger("ray_synth")
Row = dict[str, Any]


class Item(NamedTuple):
    """One image as it is held in memory: pixels (3, size, size) uint8, or still encoded."""

    form: Any
    label: int
    name: str


class Batch(NamedTuple):
    """Images (n, 3, size, size) uint8, labels (n,) int64, and the images' ids."""

    images: Tensor
    labels: Tensor
    names: list[str]


class Decoder:
    """Rows to items to batches, in two halves.

    Where the transform draws nothing at random for a single image, images are kept as pixels and `keep`
    does the work. Else they are kept encoded and cropped again at each draw: `batch` does the work, in
    `workers` processes (0: in the calling thread). What is drawn is a function of the seed alone.
    Corrupt images are counted and named once; a batch that meets one uses another image in its place.

    Args:
        num_classes: labels must lie below; None: not checked.
    """

    def __init__(
        self,
        transform: ImageTransform,
        max_pixels: int = 50_000_000,
        *,
        num_classes: int | None = None,
        workers: int = 0,
    ) -> None:
        self.ready = not transform.random
        self.transform, self.max_pixels = transform, max_pixels
        self.num_classes = num_classes
        self.corrupt: list[str] = []
        self.workers = workers
        self.pool = _pool(workers, transform, max_pixels) if workers and not self.ready else None

    def keep(self, row: Row) -> Item | None:
        """The form in which a row is held; None where it cannot be decoded.

        Raises:
            UserError: the label is not one of the model's.
        """
        name = str(row.get("sample_id") or row.get("image_id") or "an image")
        label = int(row["class_index"])
        if label < 0 or (self.num_classes is not None and label >= self.num_classes):
            raise UserError(
                f"{name} has label {label}, out of range: the classifier has {self.num_classes} "
                "classes, 0 to one less; check data.class_names and class_map"
            )
        if not self.ready:
            return Item(row["image"], label, name)
        found = decode(row["image"], self.transform, self.max_pixels)
        if isinstance(found, UserError):
            self._set_aside(name, found)
            return None
        return Item(found, label, name)

    def keep_all(self, rows: Iterable[Row]) -> list[Item]:
        return [item for row in rows if (item := self.keep(row)) is not None]

    def batch(self, items: list[Item], seed: int = 0) -> Batch:
        """The items' pixels; random crops and colours are drawn from `seed`.

        Raises:
            UserError: not one of them could be decoded.
        """
        pixels = [item.form for item in items] if self.ready else self._draw(items, seed)
        good = [at for at, image in enumerate(pixels) if image is not None]
        if not good:
            raise UserError(
                "no image of a whole batch could be decoded, the last one: "
                f"{items[-1].name}; check the images"
            )
        if len(good) < len(items):
            places = [
                at if pixels[at] is not None else good[at % len(good)] for at in range(len(items))
            ]
            pixels, items = [pixels[at] for at in places], [items[at] for at in places]
        return Batch(
            torch.stack([image for image in pixels if image is not None]),
            torch.tensor([item.label for item in items], dtype=torch.int64),
            [item.name for item in items],
        )

    def _draw(self, items: list[Item], seed: int) -> list[Tensor | None]:
        seeds = np.random.SeedSequence(seed).generate_state(len(items)).tolist()
        encoded = [item.form for item in items]
        if self.pool is not None:
            chunk = -(-len(items) // (2 * self.workers))
            drawn = list(self.pool.map(_decode_in_process, encoded, seeds, chunksize=chunk))
        else:
            drawn = [
                decode(data, self.transform, self.max_pixels, seed)
                for data, seed in zip(encoded, seeds, strict=True)
            ]
        for item, found in zip(items, drawn, strict=True):
            if isinstance(found, UserError):
                self._set_aside(item.name, found)
        return [None if isinstance(found, UserError) else torch.as_tensor(found) for found in drawn]

    def _set_aside(self, name: str, error: UserError) -> None:
        if name not in self.corrupt:
            self.corrupt.append(name)
            log.warning("set aside %s: %s", name, error, extra={"sample_id": name})

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def decode(
    data: bytes, transform: ImageTransform, max_pixels: int, seed: int | None = None
) -> Tensor | UserError:
    """Encoded bytes to (3, size, size) uint8; why not, where they are not an image.

    Only decoding says so: an error of the transform is a bug, and is raised as it is.
    """
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except UserError as error:
        return error
    return transform.prepare(image, seed)


def _pool(workers: int, transform: ImageTransform, max_pixels: int) -> ProcessPoolExecutor:
    # Not fork: the worker that calls has threads (Ray's, torch's), whose locks a child would inherit.
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_process,
        initargs=(transform, max_pixels),
    )


_process: dict[str, Any] = {}


def _start_process(transform: ImageTransform, max_pixels: int) -> None:
    torch.set_num_threads(1)
    _process.update(transform=transform, max_pixels=max_pixels)


def _decode_in_process(data: bytes, seed: int) -> Any:
    found = decode(data, _process["transform"], _process["max_pixels"], seed)
    # As an array: torch would send a tensor through shared memory, one file handle each.
    return found if isinstance(found, UserError) else found.numpy()
