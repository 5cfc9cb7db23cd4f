"""An index of real images: which rows of which shards belong to which class, and a Ray Dataset of them.

config -> `load_index` (labels only) -> `select` (a few per class) -> `inspection.py` (corrupt images set
aside) -> `to_ray` (encoded bytes, streamed).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.config import IN_DOMAIN, DataConfig, SourceConfig
from ray_synth.data import imagenet
from ray_synth.data.labels import LeftOut, joined, match_classes, near_class, tidy
from ray_synth.data.places import Readable, read_all
from ray_synth.data.sources import Shard, list_shards, read_labels, read_rows
from ray_synth.errors import UserError, shortened
from ray_synth.storage.filesystems import at_once

if TYPE_CHECKING:
    import ray.data

ROWS_PER_TASK = 1_024  # of one shard, read by one task
HOLD_OUT_SEED = 2_312_02253  # the paper's number: unlike any seed that a run is likely to have


@dataclass(frozen=True)
class Index:
    """Rows of a source that carry a known class.

    Attributes:
        class_names: name of each class index.
        shards: the shards that hold the rows.
        shard: (rows,) int64, the position in `shards`.
        row: (rows,) int64, the row inside its shard.
        label: (rows,) int64, the class index.
        numbering: what the source calls class 0, 1, ...: its own names, or `class_names`.
        left_out: what else the source holds.
    """

    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    shard: np.ndarray
    row: np.ndarray
    label: np.ndarray
    numbering: tuple[str, ...] = ()
    left_out: LeftOut = field(default=LeftOut(), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray) -> Index:
        return replace(self, shard=self.shard[rows], row=self.row[rows], label=self.label[rows])

    def locate(self, at: int) -> Readable:
        """Where an image's bytes are read from; only where its shard is addressable."""
        return self.shards[self.shard[at]].locate(int(self.row[at]))

    def image_id(self, at: int) -> str:
        return self.shards[self.shard[at]].image_id(int(self.row[at]))

    def counts(self) -> dict[str, int]:
        """Images of each class."""
        found = np.bincount(self.label, minlength=len(self.class_names))
        return dict(zip(self.class_names, found.tolist(), strict=True))


def load_index(
    source: SourceConfig,
    class_names: tuple[str, ...] | None = None,
    *,
    numbering: tuple[str, ...] = (),
) -> Index:
    """Index a source by its labels alone.

    Labels become classes by `class_map`, by being one of `class_names`, or, where all are whole
    numbers, by position. With no `class_names`, the sorted labels are the classes.

    Args:
        numbering: what class 0, 1, ... is called, where that is not the order of `class_names`.

    Raises:
        UserError: it holds no images, no label, no label that is a known class, or what is no label.
    """
    origin = str(source.path or source.format)
    found = list_shards(source)
    if source.format == "parquet":  # the others have them already
        parts = at_once(read_labels, found.shards)
    else:
        parts = [read_labels(shard) for shard in found.shards]
    labels = joined(parts)
    if not len(labels.codes):
        raise UserError(f"{origin} holds no images")
    class_map = source.class_map
    if isinstance(class_map, str):
        class_map = imagenet.class_map(class_map)
    names, classes, others = match_classes(labels, origin, class_names, class_map, numbering)
    counts = [len(part.codes) for part in parts]
    index = Index(
        names,
        tuple(found.shards),
        np.repeat(np.arange(len(counts)), counts),
        np.concatenate([np.arange(count) for count in counts]),
        classes,
        names if class_names or not set(labels.numbering) >= set(names) else labels.numbering,
        replace(others, passed_over=found.passed_over),
    )
    return index.take(np.flatnonzero(classes >= 0))


def load_tests(
    data: DataConfig, class_names: tuple[str, ...], seed: int, *, numbering: tuple[str, ...] = ()
) -> dict[str, Index]:
    """The test sets by name, `in_domain` the first.

    Args:
        numbering: as the training set's `Index` has it.

    Raises:
        UserError: as `load_index` does, or an image has no label.
    """
    tests = {}
    for name, source in {IN_DOMAIN: data.test, **data.ood}.items():
        index = load_index(source, class_names, numbering=numbering)
        require_labels(index, setting_of(name), source)
        tests[name] = select(index, source.images_per_class, seed)
    return tests


def setting_of(test_set: str) -> str:
    """The setting that names a test set's source."""
    return "data.test" if test_set == IN_DOMAIN else f"data.ood.{test_set}"


def left_out(train: Index, tests: Mapping[str, Index]) -> list[str]:
    """What is not used of the data, a sentence for each kind of it."""
    lines = train.left_out.told("data.train", train.class_names)
    for name, index in tests.items():
        lines += index.left_out.told(setting_of(name), index.class_names)
    return lines


def require_labels(index: Index, origin: str, source: SourceConfig) -> None:
    """Raises UserError where an image of a test set has no label: it would not be tested on."""
    if index.left_out.unlabelled:
        raise UserError(
            f"{origin}: {index.left_out.unlabelled:,} images of {source.path} have no label (null, empty "
            "or a negative number, as hidden test labels are), and a test set needs one for each: take a "
            "split that has labels, or leave those images out of it"
        )


def require_every_class(index: Index, origin: str) -> Index:
    """Raises UserError where a class has no image at all."""
    empty = [repr(name) for name, count in index.counts().items() if not count]
    if empty:
        raise UserError(
            f"{origin}: no image of {shortened(empty, 5, what='classes')}; add images, or take the "
            "class out of class_names"
        )
    return index


def select(
    index: Index,
    images_per_class: int | dict[str, int] | None,
    seed: int,
    without: np.ndarray | None = None,
) -> Index:
    """At most `images_per_class` of each class, chosen by `seed`; nested as the number grows.

    Args:
        images_per_class: one number, or one by class name; a class that it lacks is taken whole.
        without: (rows,) bool, rows that cannot be taken: the next of their class are, in their places.

    Raises:
        UserError: a name is not a class.
    """
    most = wanted(index, images_per_class)
    return index.take(np.flatnonzero(turns(index, seed, without) < most[index.label]))


def wanted(index: Index, images_per_class: int | dict[str, int] | None) -> np.ndarray:
    """(classes,) int64: how many images of each class are taken at most. Raises as `select`."""
    most = np.full(len(index.class_names), len(index))
    if isinstance(images_per_class, dict):
        images_per_class = {tidy(name): number for name, number in images_per_class.items()}
        unknown = sorted(set(images_per_class) - set(index.class_names))
        if unknown:
            hint = near_class(unknown[0], index.class_names)
            raise UserError(f"images_per_class: no class is named {unknown[0]!r}{hint}")
        for name, number in images_per_class.items():
            most[index.class_names.index(name)] = number
    elif images_per_class is not None:
        most[:] = images_per_class
    return most


def turns(index: Index, seed: int, without: np.ndarray | None = None) -> np.ndarray:
    """(rows,) int64: when each image's turn is among those of its class, in an order by `seed`.

    Args:
        without: as of `select`; they have no turn, which is said by the number of all rows.
    """
    order = np.random.default_rng(seed).permutation(len(index))
    if without is not None:
        order = order[~without[order]]
    by_class = order[np.argsort(index.label[order], kind="stable")]
    counts = np.bincount(index.label[order], minlength=len(index.class_names))
    found = np.full(len(index), len(index), dtype=np.int64)
    found[by_class] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return found


def hold_out(index: Index, images_per_class: int | None) -> tuple[Index, Index]:
    """What is left to train on, and the images held out of it.

    The same images are held out whatever the run's seed, so that no seed trains on what another is
    chosen by.

    Raises:
        UserError: a class would have no image left.
    """
    if images_per_class is None:
        return index, index.take(np.arange(0))
    for name, count in index.counts().items():
        if count <= images_per_class:
            raise UserError(
                f"data.validation holds {images_per_class} images of each class out of training, and "
                f"{name!r} has {count} in all: give a smaller number"
            )
    held = turns(index, HOLD_OUT_SEED) < images_per_class
    return index.take(np.flatnonzero(~held)), index.take(np.flatnonzero(held))


def tasks(index: Index) -> list[dict[str, Any]]:
    """Units of reading: a shard with the rows and classes wanted from it, in the order of both."""
    order = np.lexsort((index.row, index.shard))
    shard, row, label = index.shard[order], index.row[order], index.label[order]
    first = np.flatnonzero(np.diff(shard, prepend=-1))
    units = []
    for start, stop in pairwise([*first.tolist(), len(order)]):
        position = int(shard[start])
        for at in range(start, stop, ROWS_PER_TASK):
            part = slice(at, min(at + ROWS_PER_TASK, stop))
            units.append(
                {
                    "shard": index.shards[position],
                    "position": position,
                    "rows": row[part].tolist(),
                    "labels": label[part].tolist(),
                }
            )
    return units


def read_task(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows `{image_id, image, class_index}` of one unit of reading."""
    labels = dict(zip(task["rows"], task["labels"], strict=True))
    pairs = read_rows(task["shard"], task["rows"])
    for row, (image_id, data) in zip(sorted(task["rows"]), pairs, strict=True):
        yield {"image_id": image_id, "image": data, "class_index": labels[row]}


def read_index(index: Index) -> Iterator[dict[str, Any]]:
    """All rows of an index, in this process."""
    for task in tasks(index):
        yield from read_task(task)


class ImagesByClass(Mapping[int, list[bytes]]):
    """Encoded images of an index, by class index, in the order of the source.

    A class's images are read when they are asked for, since those of 1,000 classes take gigabytes. Only
    Parquet sets are read whole, once: they give no single image.
    """

    def __init__(self, index: Index) -> None:
        order = np.lexsort((index.row, index.shard, index.label))
        labels, first = np.unique(index.label[order], return_index=True)
        self.index = index
        self._places = dict(zip(labels.tolist(), np.split(order, first[1:]), strict=True))
        self._whole: dict[int, list[bytes]] | None = None

    def __getitem__(self, label: int) -> list[bytes]:
        places = self._places[label]
        if all(self.index.shards[shard].addressable for shard in self.index.shard[places]):
            return list(read_all(self.index.locate(int(at)) for at in places))
        if self._whole is None:
            self._whole = {}
            for row in read_index(self.index):
                self._whole.setdefault(row["class_index"], []).append(row["image"])
        return self._whole[label]

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def named(index: Index, image_ids: Iterable[str]) -> np.ndarray:
    """(rows,) bool: which rows have one of these names."""
    image_ids = set(image_ids)
    shards = index.shards if image_ids else ()
    by_prefix: dict[str, list[int]] = {}
    for position, shard in enumerate(shards):
        by_prefix.setdefault(shard.prefix, []).append(position)
    found = [np.empty((2, 0), np.int64)]  # shards and rows
    for prefix, positions in by_prefix.items():
        ends = [name[len(prefix) :] for name in image_ids if name.startswith(prefix)]
        if ends:
            found.append(_rows_of(index, positions, ends))
    shard, row = np.concatenate(found, axis=1)
    width = max(index.row.max(initial=0), row.max(initial=0)) + 1
    return np.isin(index.shard * width + index.row, shard * width + row)


def _rows_of(index: Index, positions: list[int], ends: list[str]) -> np.ndarray:
    """(2, n) int64: shards and rows by what follows the prefix in their names."""
    shards = [index.shards[position] for position in positions]
    members = [shard.members for shard in shards if shard.members is not None]
    if not members:  # rows are numbered
        numbers = (end.rpartition("/")[2] for end in ends)
        at = np.array([int(number) for number in numbers if number.isdigit()], dtype=np.int64)
        starts = np.array([shard.first_row for shard in shards])
    else:
        names = pa.chunked_array([batch["name"] for batch in members])
        at = np.flatnonzero(pc.is_in(names, pa.array(ends, pa.string())).to_numpy())
        starts = np.cumsum([0, *(len(batch) for batch in members[:-1])])
    shard = np.searchsorted(starts, at, side="right") - 1
    return np.stack([np.array(positions)[shard], at - starts[shard]])


def drop(index: Index, corrupt: list[dict[str, Any]]) -> Index:
    """The index without what `inspect` found: `{image_id, ...}` each."""
    if not corrupt:
        return index
    return index.take(np.flatnonzero(~named(index, (item["image_id"] for item in corrupt))))


def to_ray(index: Index, *, test_set: str | None = None) -> ray.data.Dataset:
    """A lazily read Ray Dataset of `{image_id, image (encoded), class_index[, test_set]}`."""
    import ray.cloudpickle as pickle
    import ray.data

    # Each read task is given its own unit alone: a list of all would be read whole by each.
    units = [{"unit": pickle.dumps(unit)} for unit in tasks(index)]

    def read(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for image in read_task(pickle.loads(row["unit"])):
            yield image if test_set is None else {**image, "test_set": test_set}

    return ray.data.from_items(units, override_num_blocks=len(units)).flat_map(read)
