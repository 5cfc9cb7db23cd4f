"""Real images of a pool that CLIP finds nearest to each class: a rival of synthetic ones.

In: what each class is like (its meaning's text and its real images), the test images that must not come
back, and units of a pool. Out: per unit a small table of candidates; of all of them the nearest of each
class; and these, as tars that `generators/imported.py` reads.

The question is that of "The Unmet Promise of Synthetic Training Images" (Geng et al., 2024): are
synthetic images better than the real ones that one could have looked up instead?
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ray_synth.config import ClipConfig
from ray_synth.data.images import EXTENSIONS, decode_image
from ray_synth.data.places import read_all
from ray_synth.data.pool import Unit
from ray_synth.errors import UserError
from ray_synth.generation.label_check import prototypes
from ray_synth.generation.thresholds import EXACT_COPY, QualityReference
from ray_synth.storage.folder import Folder

if TYPE_CHECKING:
    from PIL import Image

    from ray_synth.meaning.clip import ClipModel

CANDIDATES = pa.schema([("row", pa.int32()), ("class_index", pa.int32()), ("score", pa.float32())])
PRUNE_AT = 1_000_000  # candidates beyond those that are kept, at 24 bytes each


@dataclass(frozen=True, eq=False)
class Question:
    """What is looked for.

    Attributes:
        classes: (classes, dim) float32 unit rows: what each is like, see `prototypes`.
        tests: (n, dim) float32 unit rows: images that must not be trained on.
        reach: (classes,) float64: the cosine distance below which two images are near-duplicates.
    """

    classes: np.ndarray
    tests: np.ndarray
    reach: np.ndarray

    @classmethod
    def of(cls, reference: QualityReference, tests: np.ndarray, *, by_text: bool) -> Question:
        """From what a run measures on its real images.

        Args:
            by_text: the meanings alone say what a class is like, not its real images.
        """
        texts = reference.text_features
        real = {} if by_text else reference.real_features
        near = reference.thresholds.duplicate_distance
        reach = np.array([near.get(index, EXACT_COPY) for index in sorted(texts)])
        return cls(prototypes(texts, real).rows, tests, reach)

    def judge(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) the class that each image is nearest to, its similarity, and whether it is a copy.

        Args:
            features: (n, dim) float32 unit rows.
        """
        similar = features @ self.classes.T
        nearest = similar.argmax(axis=1)
        copies = np.zeros(len(features), bool)
        if len(self.tests):
            copies = 1 - (features @ self.tests.T).max(axis=1) < self.reach[nearest]
        return nearest, similar[np.arange(len(features)), nearest], copies


class Embedder:
    """An actor's CLIP: encoded images in, unit features out."""

    def __init__(self, clip: ClipConfig) -> None:
        from ray_synth.meaning.clip import load_clip

        self.clip: ClipModel = load_clip(clip, num_threads=max(1, int(clip.num_cpus)))

    def features(self, images: Sequence[bytes]) -> tuple[list[int], np.ndarray]:
        """Positions of those that can be decoded, and (n, dim) float32 features of them."""
        there, pixels = [], []
        for at, data in enumerate(images):
            try:
                picture: Image.Image = decode_image(data, enough=2 * self.clip.image_size)
            except UserError:
                continue
            there.append(at)
            pixels.append(self.clip.preprocess(picture))
        return there, self.clip.encode_pixels(pixels)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Of a batch of Ray Data: column `image` in, `feature` out."""
        _, found = self.features(list(batch["image"]))
        return {"feature": found.astype(np.float16)}


class Ranker(Embedder):
    """Ranks whole units, each into a table of its own: what is there is not ranked again."""

    def __init__(self, clip: ClipConfig, question: Any, parts: Folder) -> None:
        import ray

        super().__init__(clip)
        self.question: Question = ray.get(question)
        self.parts = parts

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Of a batch of Ray Data: columns `at` and `unit` (pickled) in, `images` that were read out."""
        import ray.cloudpickle as pickle

        read = [
            self.rank(int(at), pickle.loads(unit))
            for at, unit in zip(batch["at"], batch["unit"], strict=True)
        ]
        return {"images": np.array(read)}

    def rank(self, at: int, unit: Unit) -> int:
        """Write the candidates of a unit, with how many were read, broken and copies; the first."""
        rows: list[int] = []
        classes, scores = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
        shard = unit.open()
        total = shard.stop if shard else 0
        broken = copied = 0
        size = self.clip.max_batch_size
        for start in range(0, total, size):
            assert shard is not None
            chunk = range(start, min(start + size, total))
            there, features = self.features(list(read_all(shard.locate(row) for row in chunk)))
            broken += len(chunk) - len(there)
            if not there:
                continue
            nearest, score, copies = self.question.judge(features)
            copied += int(copies.sum())
            rows += [chunk[there[place]] for place in np.flatnonzero(~copies)]
            classes.append(nearest[~copies].astype(np.int32))
            scores.append(score[~copies].astype(np.float32))
        columns = [pa.array(rows, pa.int32()), np.concatenate(classes), np.concatenate(scores)]
        counts = {"images": total, "unreadable": broken, "copies": copied}
        schema = CANDIDATES.with_metadata({"counts": json.dumps(counts)})
        self.parts.write_table(part_name(at, unit), pa.table(columns, schema=schema))
        return total


def part_name(at: int, unit: Unit) -> str:
    return f"part-{at:06d}-{unit.digest}.parquet"


class Best:
    """The nearest images of each class among candidates that come unit by unit.

    Memory grows with what is kept, not with the pool.

    Args:
        most: (classes,) int64, how many of each.
    """

    def __init__(self, most: np.ndarray) -> None:
        self.most = most
        self._kept = np.empty((0, 4), np.float64)  # class, -score, unit, row
        self._new: list[np.ndarray] = []
        self._waiting = 0

    def add(self, unit: int, table: pa.Table) -> None:
        """The candidates of a unit, `CANDIDATES`."""
        label, score = table["class_index"].to_numpy(), table["score"].to_numpy()
        row = table["row"].to_numpy()
        self._new.append(np.stack([label, -score, np.full(len(row), unit), row], axis=1))
        self._waiting += len(row)
        if self._waiting > PRUNE_AT:
            self._prune()

    def _prune(self) -> None:
        rows = np.concatenate([self._kept, *self._new])
        self._new, self._waiting = [], 0
        rows = rows[np.lexsort(rows.T[::-1])]  # of equals the first of the pool
        counts = np.bincount(rows[:, 0].astype(np.int64), minlength=len(self.most))
        turn = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._kept = rows[turn < np.repeat(self.most, counts)]

    def found(self) -> dict[int, pa.Table]:
        """Unit -> its chosen rows in order, `CANDIDATES`; units of which none is chosen are left out."""
        self._prune()
        of_unit = self._kept[np.lexsort((self._kept[:, 3], self._kept[:, 2]))]
        units, first = np.unique(of_unit[:, 2], return_index=True)
        parts = np.split(of_unit, first[1:]) if len(units) else []
        return {
            int(unit): pa.table(
                [
                    pa.array(part[:, 3].astype(np.int32)),
                    pa.array(part[:, 0].astype(np.int32)),
                    pa.array((-part[:, 1]).astype(np.float32)),
                ],
                schema=CANDIDATES,
            )
            for unit, part in zip(units, parts, strict=True)
        }


def write_chosen(
    unit: Unit, chosen: pa.Table, class_names: Sequence[str], folder: Folder, name: str
) -> None:
    """A tar of a unit's chosen images, as they are, each with its class and where it came from."""
    import webdataset

    shard = unit.open()
    assert shard is not None
    rows = chosen.to_pylist()
    with folder.stream(name) as stream:
        writer = webdataset.TarWriter(_Unclosed(stream), encoder=False, mtime=0)
        for item, data in zip(
            rows, read_all(shard.locate(item["row"]) for item in rows), strict=True
        ):
            ending = _ending(data)
            if not ending:  # it was there when the pool was read
                continue
            said = {"score": round(item["score"], 6), "from": shard.image_id(item["row"])}
            writer.write(
                {
                    "__key__": f"{name.partition('.')[0]}-{item['row']:06d}",
                    ending: data,
                    "cls": class_names[item["class_index"]].encode(),
                    "json": json.dumps(said).encode(),
                }
            )
        writer.close()


class _Unclosed(io.RawIOBase):
    """A stream that whoever opened it closes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self.stream.write(data)


def _ending(data: bytes) -> str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            found = (image.format or "").lower()
    except Exception:  # PIL's decoders raise nearly anything on broken files
        return ""
    return found if f".{found}" in EXTENSIONS else "jpg" if found == "mpo" else ""


def candidates(
    parts: Folder, names: Sequence[str]
) -> Iterator[tuple[int, pa.Table, dict[str, int]]]:
    """(unit, its candidates, its counts) of all units, one after the other."""
    for at, name in enumerate(names):
        with parts.open_table(name) as file:
            counts = json.loads(file.schema_arrow.metadata[b"counts"])
            yield at, file.read(), counts
