"""Draws of images to batches of pixels, here, in processes or in Ray tasks; corrupt images are set aside.

In: `Draw`s of items, one per domain. Out: one `Batch` for all of them, in their order.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ray_synth.data.images import decode_image
from ray_synth.data.places import Readable, read_all
from ray_synth.errors import UserError
from ray_synth.training.shared_memory import AHEAD, packed, shared_bytes, slots_of, with_room

if TYPE_CHECKING:
    from ray_synth.training.augmentation import ImageTransform

log = logging.getLogger("ray_synth")
Row = dict[str, Any]
# What decoding processes have loaded when they start; the first takes 4 s, the others next to nothing.
PRELOADED = ["ray_synth.training.decoder", "timm.data.transforms_factory", "pyarrow"]


class Item(NamedTuple):
    """One image: pixels (3, size, size) uint8, encoded bytes, or where these are read from."""

    form: Any  # Tensor | bytes | Readable
    label: int
    name: str


class Draw(NamedTuple):
    """The images of one domain in a batch; `seed` decides their random crops and colours."""

    items: list[Item]
    seed: int


class Batch(NamedTuple):
    """Images (n, 3, size, size) uint8, labels (n,) int64, and the images' ids."""

    images: Tensor
    labels: Tensor
    names: list[str]


class Task(NamedTuple):
    """What is sent to a process for one batch; one entry per image.

    Attributes:
        slot: which part of the memory that all share the pixels are for.
        forms: a place; the number of bytes, which then come next in `packed`; or None: already pixels.
        seeds: of what is drawn for each image.
        packed: encoded bytes one after the other, (total,) uint8 in shared memory.
    """

    slot: int
    forms: list[Readable | int | None]
    seeds: list[int]
    packed: Tensor


Decoded = tuple[Tensor, dict[int, str]]  # see `decode_all`


class Decoder:
    """Rows to items to batches.

    Where the transform draws nothing at random for a single image, rows are kept as pixels and `keep`
    does the work. Else they are kept encoded, or are places of an index, and cropped again at each
    draw. What is drawn is a function of the seed alone. Corrupt images are counted and named once; a
    batch that meets one uses another image of its domain in its place.

    Args:
        num_classes: labels must lie below; None: not checked.
        workers: processes that read and decode, a whole batch each, for what is not pixels yet; 0: the
            calling thread does.
        on_cluster: they are Ray tasks on any node's CPUs, not processes of this node.
    """

    def __init__(
        self,
        transform: ImageTransform,
        max_pixels: int = 50_000_000,
        *,
        num_classes: int | None = None,
        workers: int = 0,
        on_cluster: bool = False,
    ) -> None:
        self.ready = not transform.random
        self.transform, self.max_pixels = transform, max_pixels
        self.num_classes = num_classes
        self.corrupt: list[str] = []
        self.workers, self.on_cluster = workers, on_cluster

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
            self._set_aside(name, str(found))
            return None
        return Item(found, label, name)

    def keep_all(self, rows: Iterable[Row]) -> list[Item]:
        return [item for row in rows if (item := self.keep(row)) is not None]

    def batch(self, *draws: Draw) -> Batch:
        """The pixels of some draws, in their order; decoded here.

        Raises:
            UserError: not one image of a draw could be decoded.
        """
        items = [item for draw in draws for item in draw.items]
        if all(isinstance(item.form, Tensor) for item in items):
            return _batch(torch.stack([item.form for item in items]), items)
        forms = [None if isinstance(item.form, Tensor) else item.form for item in items]
        return self._whole(
            draws, *decode_all(forms, _seeds(draws), self.transform, self.max_pixels)
        )

    def batches(self, draws: Iterator[Sequence[Draw]]) -> Generator[Batch, None, None]:
        """A batch for each of the draws, in their order; with processes, `AHEAD` for each of them.

        Those write into memory that is shared and used again: a batch's images are there until the next
        is asked for. All batches must be of one size.

        Raises:
            UserError: as `batch` does.
        """
        first = next(draws, ())
        draws = chain([first] if first else [], draws)
        pixels = all(isinstance(item.form, Tensor) for draw in first for item in draw.items)
        count = sum(len(draw.items) for draw in first)
        workers = self.workers
        if workers and not pixels and not self.on_cluster:
            workers = with_room(workers, count * 3 * self.transform.image_size**2)
        if not workers or pixels:
            for some in draws:
                yield self.batch(*some)
            return
        waiting: deque[Sequence[Draw]] = deque()  # batches come back in the order of their tasks
        slots = slots_of(workers)

        def tasks() -> Iterator[Task]:
            for number, some in enumerate(draws):
                waiting.append(some)
                yield _task(some, number % slots)

        found = (
            self._ray_tasks(tasks())
            if self.on_cluster
            else self._processes(tasks(), workers, count)
        )
        for images, errors in found:
            yield self._whole(waiting.popleft(), images, errors)

    def _ray_tasks(self, tasks: Iterator[Task]) -> Iterator[Decoded]:
        """What Ray tasks have decoded, in order; a batch comes through the object store, and is copied
        once."""
        import ray

        # Without a strategy of their own they would belong to the placement group of the caller.
        decode = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_decode_on_cluster)
        settings = ray.put((self.transform, self.max_pixels))
        waiting: deque[Any] = deque()

        def fetched() -> Decoded:
            array, errors = ray.get(waiting.popleft())
            return torch.from_numpy(array.copy()).permute(0, 3, 1, 2), errors  # it is read-only

        for task in tasks:
            waiting.append(decode.remote(task.forms, task.seeds, task.packed.numpy(), settings))
            if len(waiting) >= AHEAD * self.workers:
                yield fetched()
        while waiting:
            yield fetched()

    def _processes(self, tasks: Iterator[Task], workers: int, count: int) -> Iterator[Decoded]:
        """What processes of a DataLoader have decoded, in order."""
        import multiprocessing

        from torch.utils.data import DataLoader

        # Not fork: the worker that calls has threads (Ray's, torch's), whose locks a child would inherit.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        # Allocated once: fresh memory for each batch would cost as much as copying it.
        slots, size = slots_of(workers), self.transform.image_size
        shared = shared_bytes(slots * count * 3 * size**2).view(slots, count, size, size, 3)
        shared.zero_()  # taken now: others that look for room see what is left
        loader: DataLoader[Any] = DataLoader(
            _Tasks(self.transform, self.max_pixels, shared),  # type: ignore[arg-type]
            batch_sampler=tasks,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=AHEAD,
            multiprocessing_context=context,
            generator=torch.Generator(),  # else its seed is drawn from the state that training uses
        )
        batches: Any = iter(loader)
        try:
            for slot, errors in batches:
                yield shared[slot].permute(0, 3, 1, 2), errors
        except (ConnectionError, EOFError) as error:  # while a batch was being handed over
            raise RuntimeError(
                "a decoding process exited unexpectedly: was it killed, or out of memory?"
            ) from error
        finally:  # not when the last traceback that knows of them is collected
            batches._shutdown_workers()

    def _whole(self, draws: Sequence[Draw], images: Tensor, errors: dict[int, str]) -> Batch:
        """Add what was pixels, and put good images in the places of corrupt ones."""
        items = [item for draw in draws for item in draw.items]
        for at, item in enumerate(items):
            if isinstance(item.form, Tensor):
                images[at] = item.form
        for at, error in errors.items():
            self._set_aside(items[at].name, error)
        if errors:
            start = 0
            for draw in draws:
                _replace(images, items, range(start, start + len(draw.items)), errors)
                start += len(draw.items)
        return _batch(images, items)

    def _set_aside(self, name: str, error: str) -> None:
        if name not in self.corrupt:
            self.corrupt.append(name)
            log.warning("set aside %s: %s", name, error, extra={"sample_id": name})


class _Tasks:
    """What a decoding process does with a task; a map-style dataset whose indices are tasks."""

    def __init__(self, transform: ImageTransform, max_pixels: int, shared: Tensor) -> None:
        self.transform, self.max_pixels, self.shared = transform, max_pixels, shared

    def __getitems__(self, task: Task) -> tuple[int, dict[int, str]]:
        forms = _unpacked(task.forms, task.packed.numpy())
        images = self.shared[task.slot].permute(0, 3, 1, 2)
        assert len(forms) == len(images), "batches of one size"
        _, errors = decode_all(forms, task.seeds, self.transform, self.max_pixels, images)
        return task.slot, errors


def _decode_on_cluster(
    forms: list[Readable | int | None],
    seeds: list[int],
    packed: np.ndarray,
    settings: tuple[ImageTransform, int],
) -> tuple[np.ndarray, dict[int, str]]:
    """The task of Ray; (n, size, size, 3), since an array is sent without a copy in this order alone."""
    images, errors = decode_all(_unpacked(forms, packed), seeds, *settings)
    return images.permute(0, 2, 3, 1).numpy(), errors


def _unpacked(
    forms: list[Readable | int | None], packed: np.ndarray
) -> list[Readable | bytes | None]:
    """Forms of a `Task` with their bytes."""
    found: list[Readable | bytes | None] = []
    start = 0
    for form in forms:
        if isinstance(form, int):
            found.append(packed[start : start + form].tobytes())
            start += form
        else:
            found.append(form)
    return found


def decode_all(
    forms: Sequence[bytes | Readable | None],
    seeds: Sequence[int],
    transform: ImageTransform,
    max_pixels: int,
    images: Tensor | None = None,
) -> Decoded:
    """Read and decode images; those that are None are left out.

    Args:
        images: where the pixels go; default: new memory.

    Returns:
        (n, 3, size, size) uint8, of channels last; and why an image could not be decoded, by position.
    """
    size = transform.image_size
    if images is None:
        images = torch.empty(len(forms), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    errors: dict[int, str] = {}
    places = [at for at, form in enumerate(forms) if form is not None]
    for at, data in zip(places, read_all(f for f in forms if f is not None), strict=True):
        found = decode(data, transform, max_pixels, seeds[at])
        if isinstance(found, UserError):
            errors[at] = str(found)
        else:
            images[at] = found
    return images, errors


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


def _task(draws: Sequence[Draw], slot: int) -> Task:
    forms: list[Readable | int | None] = []
    encoded: list[bytes] = []
    for draw in draws:
        for item in draw.items:
            if isinstance(item.form, bytes):
                encoded.append(item.form)
                forms.append(len(item.form))
            else:
                forms.append(None if isinstance(item.form, Tensor) else item.form)
    return Task(slot, forms, _seeds(draws), packed(encoded))


def _seeds(draws: Sequence[Draw]) -> list[int]:
    """One for each image."""
    found = (np.random.SeedSequence(draw.seed).generate_state(len(draw.items)) for draw in draws)
    return np.concatenate(list(found)).tolist()


def _replace(images: Tensor, items: list[Item], domain: range, errors: dict[int, str]) -> None:
    good = [at for at in domain if at not in errors]
    if not good:
        raise UserError(
            "no image of a whole batch could be decoded, the last one: "
            f"{items[domain[-1]].name} ({errors[domain[-1]]}); check the images"
        )
    for at in domain:
        if at in errors:
            other = good[(at - domain.start) % len(good)]
            images[at], items[at] = images[other], items[other]


def _batch(images: Tensor, items: Sequence[Item]) -> Batch:
    labels = torch.tensor([item.label for item in items], dtype=torch.int64)
    return Batch(images, labels, [item.name for item in items])


def _as_it_is(batch: Any) -> Any:
    return batch
