"""What real images say about generated ones: the least CLIP score, the distance of near-duplicates.

Real images and the meaning of each class go in; a `QualityReference` comes out, one Parquet file in
the run's folder, by which every actor judges in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ray_synth.data.images import decode_image
from ray_synth.errors import UserError
from ray_synth.generation.label_check import least_margin
from ray_synth.meaning.candidates import TEMPLATES, with_article
from ray_synth.meaning.ranking import unit_means
from ray_synth.storage.damage import damaged
from ray_synth.storage.folder import Folder

if TYPE_CHECKING:
    from PIL import Image

    from ray_synth.config import ClipConfig, QualityConfig
    from ray_synth.meaning.clip import ClipModel

# Embeddings of one picture come out nearer than this: bfloat16 against float32 at most 0.000076
# apart. The nearest two of 500 MNIST digits of a class are 14 times further apart (embedded CLIP).
EXACT_COPY = 1e-4
# A class's own quantile counts when about this many of its own images lie below it.
ENOUGH_BELOW = 3
# A class's mean distance weighs against that of all classes as its images do against so many.
PRIOR_IMAGES = 10
REAL_PER_CLASS = 32  # real images that set the thresholds
REFERENCE_FILE = "quality_reference.parquet"


@dataclass(frozen=True)
class Thresholds:
    """What an image of each class index must reach.

    Attributes:
        texts: the meaning that the class's images are scored against.
        least_score: the least CLIP score (cosine similarity) that passes; None where unknown.
        duplicate_distance: two images whose cosine distance (1 - similarity) is below it are
            near-duplicates.
        num_images: real images that it was measured on.
        clip_model: the CLIP model that measured it; scores of another one do not compare.
        clip_quantile: the share of real images that `least_score` gives up.
        duplicate_quantile: the share of real images that `duplicate_distance` gives up.
        least_margin: see `label_check.least_margin`; None: labels are not checked.
    """

    texts: dict[int, str]
    least_score: dict[int, float | None]
    duplicate_distance: dict[int, float]
    num_images: dict[int, int]
    clip_model: str
    clip_quantile: float
    duplicate_quantile: float
    least_margin: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values that `json` writes; class indices become strings."""
        return {
            name: {str(index): entry for index, entry in value.items()}
            if isinstance(value, dict)
            else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Thresholds:
        entries: dict[str, Any] = {
            name: {int(index): item for index, item in entry.items()}
            if isinstance(entry, Mapping)
            else entry
            for name, entry in value.items()
        }
        return cls(**entries)


@dataclass(frozen=True, eq=False)
class QualityReference:
    """All that judging needs besides the CLIP model itself.

    Attributes:
        thresholds: see `Thresholds`.
        text_features: class index -> (dim,) float32, length 1.
        real_features: class index -> (n, dim) float32, unit rows: the class's real images.
    """

    thresholds: Thresholds
    text_features: dict[int, np.ndarray]
    real_features: dict[int, np.ndarray]


def measure_reference(
    images: Mapping[int, Sequence[Image.Image | bytes]],
    texts: Mapping[int, str],
    clip: ClipModel,
    *,
    clip_quantile: float = 0.01,
    duplicate_quantile: float = 0.01,
    label_quantile: float = 0.1,
    images_per_class: int = 1000,
) -> QualityReference:
    """Embed real images and their classes' meanings, and set the thresholds by them.

    Args:
        images: class index -> real images, decoded or encoded; a class may have none.
        texts: class index -> meaning ("the number 5"); it goes into the templates that also chose
            it, whose average is scored against.
        clip_quantile: see `least_scores`.
        duplicate_quantile: see `duplicate_distances`.
        label_quantile: see `label_check.least_margin`.
        images_per_class: how many images of a class will be made, roughly.

    Raises:
        UserError: images of a class without a text, or an image that cannot be decoded.
    """
    if unknown := sorted(set(images) - set(texts)):
        raise ValueError(f"there are real images but no text for the class indices {unknown}")
    features = text_features(texts, clip)
    real = real_features({index: images.get(index, ()) for index in sorted(texts)}, clip)
    scores = {index: rows @ features[index] for index, rows in real.items()}
    thresholds = Thresholds(
        texts=dict(sorted(texts.items())),
        least_score=least_scores(scores, clip_quantile),
        duplicate_distance=duplicate_distances(
            real, duplicate_quantile, images_per_class=images_per_class
        ),
        num_images={index: len(rows) for index, rows in real.items()},
        clip_model=clip.name,
        clip_quantile=clip_quantile,
        duplicate_quantile=duplicate_quantile,
        least_margin=least_margin(features, real, label_quantile),
    )
    return QualityReference(thresholds, features, real)


def text_features(texts: Mapping[int, str], clip: ClipModel) -> dict[int, np.ndarray]:
    """class index -> (dim,) float32 of length 1: the average over the templates of its meaning."""
    if not texts:
        return {}
    order = sorted(texts)
    rows = clip.encode_texts([form.format(texts[index]) for index in order for form in TEMPLATES])
    means = unit_means(rows.reshape(len(order), len(TEMPLATES), -1))
    return dict(zip(order, means, strict=True))


def real_features(
    images: Mapping[int, Sequence[Image.Image | bytes]], clip: ClipModel
) -> dict[int, np.ndarray]:
    """class index -> (n, dim) float32 unit rows, one per image, class by class.

    Raises:
        UserError: an image's bytes cannot be decoded; it names the class index and the position.
    """
    features = {}
    for index in sorted(images):
        pixels = []  # not the pictures: these may be huge
        for position, image in enumerate(images[index]):
            try:
                picture = decode_image(image) if isinstance(image, bytes) else image
            except UserError as error:
                raise UserError(
                    f"real image {position} of class index {index} is {error}"
                ) from None
            pixels.append(clip.preprocess(picture))
        features[index] = clip.encode_pixels(pixels)
    return features


def least_scores(scores: Mapping[int, np.ndarray], quantile: float) -> dict[int, float | None]:
    """The least score that passes, for each class.

    A class with enough images (about three of them below the quantile) takes the quantile of its own
    scores. Others have too few for that, five per class say; what is pooled over all classes then is
    how far an image's score lies from the mean score of its class's *other* images, and the class
    takes its own mean plus the quantile of these. It assumes that classes differ in their mean more
    than in their spread. Leaving the image out makes the spread that of images not seen, a little
    too wide rather than too narrow.

    Of 1,000 MNIST digits not seen (embedded CLIP, quantile 0.01, 20 draws of the real images) 1.7%
    failed with 5 real images per class and 1.5% with 32. Scored against a wrong digit's meaning, 85%
    (67% to 93%) and 83% (65% to 93%) failed.

    Args:
        scores: class index -> (n,) cosine similarities of real images with their own meaning.
        quantile: the share of real images that may fail.

    Returns:
        class index -> score, None for a class without images, and where no class has two.
    """
    left_out = [
        (own - own.mean(dtype=np.float64)) * (len(own) / (len(own) - 1))
        for own in scores.values()
        if len(own) > 1
    ]
    pooled = float(np.quantile(np.concatenate(left_out), quantile)) if left_out else None
    found: dict[int, float | None] = {}
    for index, own in scores.items():
        if quantile * len(own) >= ENOUGH_BELOW:
            found[index] = round(float(np.quantile(own, quantile)), 6)
        elif len(own) == 0 or pooled is None:
            found[index] = None
        else:
            found[index] = round(float(own.mean(dtype=np.float64)) + pooled, 6)
    return found


def duplicate_distances(
    features: Mapping[int, np.ndarray], quantile: float, *, images_per_class: int = 1000
) -> dict[int, float]:
    """The cosine distance below which two images are near-duplicates, for each class.

    It is the distance that a share `quantile` of real images would have to the nearest other of their
    class, were there `images_per_class` of each. The few that there are lie further apart, as the
    n-th image has n chances to be near another; so what is looked up is the quantile times
    n / images_per_class. The nearest distances of all classes, each over its class's mean, are pooled
    for it, and their lower tail is carried on by the power of the distance that fits it (Hill's
    estimate, Weissman's quantile); the class's mean, drawn towards that of all, gives the scale. A
    class of fewer than two images takes the median of the others' distances. Never below
    `EXACT_COPY`, which is all there is where no class has two different images.

    Of 500 MNIST digits per class (embedded CLIP, quantile 0.01, images_per_class 500, 30 draws of the
    real images) this gave up, in the mean and at worst, 0.3% and 3% with 5 real images per class, 0.7%
    and 3% with 32, 0.9% and 2% with 100. With 2 it is not to be trusted: 3% and 85%. (The plain
    quantile of 5 images' nearest distances gave up a fifth of 100 images per class.)

    Args:
        features: class index -> (n, dim) unit rows.
        quantile: the share of real images that would count as near-duplicates.
        images_per_class: images of a class among which duplicates will be looked for.
    """
    nearest = {index: nearest_others(rows) for index, rows in features.items() if len(rows) > 1}
    # copies within the real images say nothing about how near different pictures come
    nearest = {i: own[own > EXACT_COPY] for i, own in nearest.items() if own.max() > EXACT_COPY}
    if not nearest:
        return dict.fromkeys(features, EXACT_COPY)
    mean = float(np.concatenate(list(nearest.values())).mean())
    scales = {
        index: (own.sum() + PRIOR_IMAGES * mean) / (len(own) + PRIOR_IMAGES)
        for index, own in nearest.items()
    }
    pool = np.concatenate([own / scales[index] for index, own in nearest.items()])
    found = {}
    for index, scale in scales.items():
        share = quantile * (len(features[index]) - 1) / max(images_per_class - 1, 1)
        found[index] = round(max(float(scale) * _lower_quantile(pool, share), EXACT_COPY), 6)
    middle = round(float(np.median(list(found.values()))), 6)
    return {index: found.get(index, middle) for index in features}


def _lower_quantile(values: np.ndarray, share: float) -> float:
    """The quantile of a sample of positive values, also for shares far below 1 / len(values)."""
    ordered = np.sort(values)
    tail = min(len(ordered) // 2, int(4 * len(ordered) ** 0.5))
    if tail < 1 or share >= tail / len(ordered) or ordered[tail] <= ordered[0]:
        return float(np.quantile(values, min(share, 1.0)))
    power = tail / float(np.log(ordered[tail] / ordered[:tail]).sum())
    return float(ordered[tail] * (share * len(ordered) / tail) ** (1 / power))


def nearest_others(rows: np.ndarray) -> np.ndarray:
    """(n,) float64: each row's cosine distance to the nearest other row, 0 or more."""
    similar = rows @ rows.T
    np.fill_diagonal(similar, -1)
    return (1.0 - similar.max(axis=1).astype(np.float64)).clip(0)


def measure_run(
    images: Mapping[int, list[bytes]],
    meanings: list[dict[str, Any]],
    clip: ClipConfig,
    checks: QualityConfig,
    images_per_class: int,
    folder: Folder,
) -> None:
    """The task that measures a run's reference and saves it, where the CLIP model can be held.

    Args:
        images: encoded real images by class index.
        meanings: entries of meanings.json, by class index.
        images_per_class: that will be made.
    """
    from ray_synth.meaning.clip import load_clip

    texts = {
        index: with_article(entry["choice"])
        if entry["choice"] == entry["class_name"]
        else entry["choice"]
        for index, entry in enumerate(meanings)
    }
    reference = measure_reference(
        images,
        texts,
        load_clip(clip),
        clip_quantile=checks.clip_quantile,
        duplicate_quantile=checks.clip_quantile,
        label_quantile=checks.label_quantile,
        images_per_class=images_per_class,
    )
    save_reference(folder, reference)


def save_reference(folder: Folder, reference: QualityReference) -> None:
    """Write `quality_reference.parquet`: one row per feature, the thresholds as JSON in its metadata."""
    features = [("text", {i: row[None] for i, row in reference.text_features.items()})]
    features.append(("real", reference.real_features))
    rows = [
        {"source": source, "class_index": index, "embedding": row}
        for source, of_class in features
        for index, stack in sorted(of_class.items())
        for row in stack
    ]
    thresholds = json.dumps(reference.thresholds.to_json(), ensure_ascii=False)
    schema = pa.schema(
        [
            pa.field("source", pa.string()),
            pa.field("class_index", pa.int64()),
            pa.field("embedding", pa.list_(pa.float32())),
        ],
        metadata={"thresholds": thresholds},
    )
    folder.write_table(REFERENCE_FILE, pa.Table.from_pylist(rows, schema=schema))


def load_reference(folder: Folder) -> QualityReference:
    """Read what `save_reference` wrote, bit for bit.

    Raises:
        FileNotFoundError: the folder has no reference.
    """
    table = folder.read_table(REFERENCE_FILE)
    try:
        kept = (table.schema.metadata or {})[b"thresholds"]
        thresholds = Thresholds.from_json(json.loads(kept))
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder.address(REFERENCE_FILE), f"no thresholds: {error}") from None
    column = table["embedding"].combine_chunks()
    stack = (
        column.flatten().to_numpy().reshape(len(column), -1) if len(column) else np.zeros((0, 0))
    )
    real = np.array(table["source"].to_pylist(), dtype=object) == "real"
    of_class = table["class_index"].to_numpy()
    return QualityReference(
        thresholds,
        {int(of_class[at]): stack[at] for at in np.flatnonzero(~real)},
        {index: stack[real & (of_class == index)] for index in thresholds.texts},
    )
