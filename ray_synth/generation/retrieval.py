"""Real images of a pool that are nearest to each class's meaning by CLIP: a rival of generated ones.

In: a pool's images, unit by unit, and what real training images say of the classes
(`quality_reference.parquet`). Out: for each class the best of them, which are no copies of another or
of a training image, as a WebDataset tar.

Each class has its own nearest images, since some texts are near to all images and would take them all.
One that several classes have goes to the class in which it comes first.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from ray_synth.config import ClipConfig
from ray_synth.data.dataset import Index, read_task
from ray_synth.data.images import decode_image, file_suffix
from ray_synth.errors import UserError
from ray_synth.generation.quality import find_duplicates
from ray_synth.generation.thresholds import EXACT_COPY, load_reference, nearest_others
from ray_synth.storage.folder import Folder

DECODERS = 4  # threads of an actor that decode and scale
WAITING = 65_536  # images that wait at least, before they are sorted in
COPY = 0.1  # of the usual distance between different images: what is nearer is a copy
NAMED = 3  # unreadable images of a unit that are named
Row = dict[str, Any]


class Nearest:
    """The best images of each class that were seen: bounded memory, the same whatever their order.

    Of equal scores the one that comes first in the pool is better. New ones wait until they are as many
    as those kept, and are sorted in then.

    Args:
        most: images of a class that are kept.

    Attributes:
        least: (classes,) float32, the score below which an image is not among the best for sure.
    """

    def __init__(self, classes: int, most: int) -> None:
        self.most = most
        self.least = np.full(classes, -np.inf, np.float32)
        self._parts = [(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))]
        self._waiting = 0

    def add(self, class_index: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Take images in; (n,) bool, which of them may be among the best."""
        good = scores >= self.least[class_index]
        self._parts.append((class_index[good], scores[good], rows[good]))
        self._waiting += int(good.sum())
        if self._waiting > max(WAITING, len(self._parts[0][0])):
            self.settled()
        return good

    def settled(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(class index, score, row) of all that are kept, by class and from the best."""
        if len(self._parts) > 1:
            labels, scores, rows = (np.concatenate(p) for p in zip(*self._parts, strict=True))
            order = np.lexsort((rows, -scores, labels))
            labels, scores, rows = labels[order], scores[order], rows[order]
            # A unit may come twice.
            new = np.append(True, (labels[1:] != labels[:-1]) | (rows[1:] != rows[:-1]))[
                : len(rows)
            ]
            labels, scores, rows = labels[new], scores[new], rows[new]
            rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
            best = rank < self.most
            self._parts, self._waiting = [(labels[best], scores[best], rows[best])], 0
            last = rank == self.most - 1
            self.least[labels[last]] = scores[last]
        return self._parts[0]

    def shared_out(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """(scores, rows) of each class that has any, from the best; no row in two classes.

        A row goes to the class in which it comes first; of those, to the one with the better score.
        """
        labels, scores, rows = self.settled()
        rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
        order = np.lexsort((labels, -scores, rank, rows))
        first = np.append(True, rows[order][1:] != rows[order][:-1])[: len(order)]
        own = np.sort(order[first])
        labels, scores, rows = labels[own], scores[own], rows[own]
        there, starts = np.unique(labels, return_index=True)
        ends = [*starts[1:], len(labels)]
        return {
            int(label): (scores[start:end], rows[start:end])
            for label, start, end in zip(there, starts, ends, strict=False)
        }


class Finder:
    """An actor with CLIP: units of reading in, the candidates of each out.

    Args:
        reference: the folder of what real images say.
        most: candidates of a class that are kept at all.
    """

    def __init__(self, clip: ClipConfig, reference: Folder, most: int, max_pixels: int) -> None:
        from ray_synth.meaning.clip import load_clip

        self.clip, self.max_pixels = load_clip(clip), max_pixels
        texts = load_reference(reference).text_features
        self.texts = np.stack([texts[label] for label in sorted(texts)])
        self.best = Nearest(len(texts), most)  # what is worse than its own best is not sent on
        self.pool = ThreadPoolExecutor(DECODERS)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        import ray.cloudpickle as pickle

        found: dict[str, list[Any]] = {
            key: [] for key in ("unit", "rows", "classes", "scores", "read", "bad", "named")
        }
        for unit, start, task in zip(batch["unit"], batch["start"], batch["task"], strict=True):
            rows, features, bad = self._features(read_task(pickle.loads(task)))
            similar = (features @ self.texts.T).astype(np.float32, copy=False)
            at, classes = np.nonzero(similar >= self.best.least)
            scores, places = similar[at, classes], rows[at] + int(start)
            self.best.add(classes, scores, places)
            found["unit"].append(int(unit))
            found["rows"].append(places)
            found["classes"].append(classes)
            found["scores"].append(scores)
            found["read"].append(len(rows))
            found["bad"].append(len(bad))
            found["named"].append(json.dumps(bad[:NAMED]))
        return found

    def _features(self, images: Iterator[Row]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Places in the unit and (n, dim) features of those that can be decoded; names of others."""
        places: list[int] = []
        parts = [np.zeros((0, self.texts.shape[1]), np.float32)]
        bad: list[str] = []
        for some in _some(enumerate(images), self.clip.max_batch_size):
            pixels = list(self.pool.map(self._pixels, [image["image"] for _, image in some]))
            bad += [im["image_id"] for (_, im), p in zip(some, pixels, strict=True) if p is None]
            places += [at for (at, _), p in zip(some, pixels, strict=True) if p is not None]
            parts.append(self.clip.encode_pixels([p for p in pixels if p is not None]))
        return np.array(places, dtype=np.int64), np.concatenate(parts), bad

    def _pixels(self, data: bytes) -> Any:
        try:
            return self.clip.preprocess(decode_image(data, max_pixels=self.max_pixels))
        except UserError:
            return None


class Writer(Finder):
    """An actor with CLIP: the candidates of a class in, the class's tar out.

    Args:
        pool: the images that candidates are places in.
        class_names, per_class: what is written, and how many of each.
        to: the folder of the tars.
    """

    def __init__(
        self, clip: ClipConfig, reference: Folder, max_pixels: int, *, pool: Index,
        class_names: tuple[str, ...], per_class: int, to: Folder,
    ) -> None:  # fmt: skip
        super().__init__(clip, reference, 1, max_pixels)
        found = load_reference(reference)
        apart = copy_distances(found.real_features)
        self.real = found.real_features
        self.thresholds = replace(found.thresholds, duplicate_distance=apart)
        self.images, self.class_names, self.per_class, self.to = pool, class_names, per_class, to

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"class_index": [], "written": [], "copies": []}
        for label, rows, scores in zip(
            batch["class_index"], batch["rows"], batch["scores"], strict=True
        ):
            written, copies = self._write(int(label), np.asarray(rows), np.asarray(scores))
            found["class_index"].append(int(label))
            found["written"].append(written)
            found["copies"].append(copies)
        return found

    def _write(self, label: int, rows: np.ndarray, scores: np.ndarray) -> tuple[int, int]:
        """How many are written, and how many better ones are copies of another image."""
        named = ({"image_id": str(row), "image": self._read(int(row))} for row in rows.tolist())
        places, features, _ = self._features(named)
        real = self.real[label]
        together = np.concatenate([real, features])
        ids = [*(f"real {at}" for at in range(len(real))), *map(str, places.tolist())]
        labels = np.full(len(ids), label)
        found = find_duplicates(ids, labels, together, self.thresholds)
        copies = {item.sample_id for item in found}
        kept = [at for at in places.tolist() if str(at) not in copies][: self.per_class]
        before = [at for at in places.tolist() if kept and at <= kept[-1]]
        self._tar(label, [int(rows[at]) for at in kept], [float(scores[at]) for at in kept])
        return len(kept), len(before) - len(kept)

    def _tar(self, label: int, rows: list[int], scores: list[float]) -> None:
        with self.to.stream(tar_name(label)) as stream, tarfile.open(None, "w", stream) as tar:
            for number, (row, score) in enumerate(zip(rows, scores, strict=True)):
                data = self._read(row)
                name = f"{label:05d}-{number:07d}"
                facts = {
                    "label": self.class_names[label],
                    "source": self.images.image_id(row),
                    "clip_score": round(score, 6),
                }
                text = json.dumps(facts, ensure_ascii=False).encode()
                for suffix, held in ((file_suffix(data) or "png", data), ("json", text)):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(held)
                    tar.addfile(member, io.BytesIO(held))

    def _read(self, row: int) -> bytes:
        return self.images.locate(row).read()


def copy_distances(real: Mapping[int, np.ndarray]) -> dict[int, float]:
    """The cosine distance below which two images are copies, for each class.

    A share of what the class's real images are from their nearest, in the mean: unlike its lower tail
    (`thresholds.duplicate_distances`) it is known from few, and what is dropped here is gone.

    Args:
        real: class index -> (n, dim) unit rows.
    """
    nearest = {label: nearest_others(rows) for label, rows in real.items() if len(rows) > 1}
    usual = float(np.concatenate([*nearest.values(), np.zeros(0)]).mean()) if nearest else 0.0
    means = {label: float(nearest[label].mean()) if label in nearest else usual for label in real}
    return {label: max(EXACT_COPY, COPY * mean) for label, mean in means.items()}


def tar_name(label: int) -> str:
    return f"class-{label:05d}.tar"


def _some(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    held = []
    for item in items:
        held.append(item)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
