"""What a learner says of itself: how unsure it is, of which classes, kinds, styles and scenes; the record
that decides the next round.

Looked at are real validation images (training images, where none are held out) and images of the newest
round. A test image never comes here. Both samples are bounded, and the record is small JSON.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ray_synth.data.dataset import Index, read_index
from ray_synth.prompting.plan_file import PLAN_FILE
from ray_synth.storage.folder import Folder
from ray_synth.training.scene_scores import Scenes, accepted_by_scene, by_scene

if TYPE_CHECKING:
    from ray_synth.generation.stored import StoredRows

MOST = 10_000  # images of each of the two samples
BATCH = 256
CONFUSED = 3  # classes that are named for each
DIGITS = 6  # of figures in the record
MEASURES = ("loss", "entropy", "margin", "doubt", "error")
EXAMPLES = 3  # images of each class that is shown
COLUMNS = ["sample_id", "image", "class_index", "kind", "style"]
TOLD = ["class_name", "prompt", "negative_prompt"]  # besides, of examples
# The plan's columns by which synthetic images are told apart. The scene is told by the prompt.
GROUPS = ("class_name", "kind", "style", "context_source")


@dataclass(frozen=True)
class Sample:
    """What a learner is scored on.

    Attributes:
        folder: of the run, whose plan has the round's rows.
        real: real images, and `real_set`, which these are: validation or training.
        stored: where all rows planned so far lie; None to leave synthetic images out.
        start, stop: the newest round's rows of the plan.
        shown: classes of which a few images are kept for the report, in the file `examples`.
        scenes: of each class, in which the round places it.
    """

    folder: Folder
    real: Index
    real_set: str
    stored: StoredRows | None
    start: int
    stop: int
    max_pixels: int
    shown: tuple[str, ...] = ()
    examples: str = ""
    scenes: Scenes = field(default_factory=dict)


def verdicts(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What a model's answers say, image by image.

    Args:
        logits: (n, num_classes) float; labels: (n,) int64.

    Returns:
        `probs` (n, num_classes); and (n,) each: `loss` and `entropy` in nats, `margin` of the likeliest
        class over the next, `doubt` (1 - the probability of the right class), `error` (0 or 1).
    """
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    probs = np.exp(log_probs)
    best = np.sort(probs, axis=1)
    of_label = log_probs[np.arange(len(labels)), labels]
    return {
        "probs": probs,
        "loss": -of_label,
        "entropy": -(probs * log_probs).sum(axis=1),
        "margin": best[:, -1] - best[:, -2] if probs.shape[1] > 1 else np.ones(len(labels)),
        "doubt": 1 - np.exp(of_label),
        "error": (probs.argmax(axis=1) != labels).astype(np.float64),
    }


def means(found: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    """`images` and the mean of each measure over some rows ((n,) bool or indices)."""
    count = len(found["loss"][rows])
    if not count:
        return {"images": 0}
    values = {name: round(float(found[name][rows].mean()), DIGITS) for name in MEASURES}
    return {"images": count, **values}


def by_class(
    found: dict[str, np.ndarray], labels: np.ndarray, class_names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """For each class its means, and `confused`: what its images are taken for, [class, mean probability
    of it, images that are], the likeliest first."""
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.searchsorted(labels[order], np.arange(1, len(class_names))))
    predicted = found["probs"].argmax(axis=1)
    rows = []
    for label, (name, mine) in enumerate(zip(class_names, parts, strict=True)):
        item: dict[str, Any] = {"class_name": name, **means(found, mine)}
        if len(mine):
            others = found["probs"][mine].mean(axis=0)
            others[label] = -1
            first = np.argsort(-others, kind="stable")[: min(CONFUSED, len(others) - 1)]
            item["confused"] = [
                [
                    class_names[at],
                    round(float(others[at]), DIGITS),
                    int((predicted[mine] == at).sum()),
                ]
                for at in first.tolist()
            ]
        rows.append(item)
    return rows


def packed(right: np.ndarray) -> str:
    """(n,) bool as hex digits, for a record; `unpacked` reads them."""
    return np.packbits(right).tobytes().hex()


def unpacked(digits: str, count: int) -> np.ndarray:
    """(count,) bool of `packed`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=count).astype(bool)


def few_real(index: Index, most: int = MOST) -> Index:
    """At most so many images, evenly over the set: the same ones after each round."""
    places = np.linspace(0, len(index) - 1, min(most, len(index))).round().astype(int)
    return index.take(np.unique(places))


def accepted_shares(sample: Sample) -> dict[str, dict[str, Any]]:
    """column -> value -> [accepted, made] of all rows of the round; `context` -> class -> scene -> the
    same, of its first `2 * MOST` rows."""
    assert sample.stored is not None
    plan = sample.folder.read_rows(PLAN_FILE, sample.start, sample.stop, list(GROUPS))
    flags = np.unpackbits(sample.stored.accepted, count=sample.stored.rows).astype(np.int64)
    plan = plan.append_column("accepted", pa.array(flags[sample.start : sample.stop]))
    counts: dict[str, dict[str, list[int]]] = {}
    for name in GROUPS:
        sums = plan.group_by(name).aggregate([("accepted", "sum"), ("accepted", "count")])
        found = {r[name]: [r["accepted_sum"], r["accepted_count"]] for r in sums.to_pylist()}
        counts[name] = dict(sorted((k, v) for k, v in found.items() if k))
    first = plan.slice(0, 2 * MOST)
    prompts = sample.folder.read_rows(
        PLAN_FILE, sample.start, sample.start + len(first), ["prompt"]
    )
    first = first.append_column("prompt", prompts["prompt"])
    return {**counts, "context": accepted_by_scene(sample.scenes, first)}


def score_learner(learner: Folder, arm: str, sample: Sample) -> dict[str, Any]:
    """The task that loads a learner and scores it; the record of it.

    Real images go through the main BN, as in the test; synthetic ones through the auxiliary BN, which is
    trained on them, where the learner has one.

    Returns:
        `real`: `set`, means, `right` (`packed`, in the order of the set), `left_out` (images that cannot
        be decoded count as wrong) and `classes` (`by_class`).
        `synthetic`: means, `kind` and `style` -> value -> means, `context` (`by_scene`), `classes`, and
        `accepted` (`accepted_shares`).
    """
    import torch

    from ray_synth.device import pick_device

    card = learner.read_json(f"models/{arm}.json")
    device = pick_device("auto")
    if device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    names = tuple(card["class_names"])
    record: dict[str, Any] = {"steps": card["steps"], "num_synthetic": card["num_synthetic"]}
    scorer = _Scorer(learner, arm, card, device, sample.max_pixels)
    found, rows, bad = scorer.of("main", read_index(sample.real))
    labels = np.array([row["class_index"] for row in rows])
    right = np.zeros(len(sample.real), bool)
    right[np.flatnonzero(~bad)] = found["error"] == 0
    record["real"] = {
        "set": sample.real_set, **means(found, np.arange(len(labels))), "right": packed(right),
        "looked_at": len(right), "left_out": int(bad.sum()), "classes": by_class(found, labels, names),
    }  # fmt: skip
    if sample.stored is not None:
        record["synthetic"] = _synthetic(scorer, card, names, sample)
    return record


def _synthetic(
    scorer: _Scorer, card: dict[str, Any], names: tuple[str, ...], sample: Sample
) -> dict[str, Any]:
    """A round's images as the learner sees them; its first ones stand for all, as a plan is shuffled."""
    assert sample.stored is not None
    made = islice(sample.stored.read(sample.start, sample.stop, COLUMNS + TOLD), MOST)
    examples: list[dict[str, Any]] = []
    seen = _watched(made, sample.shown, examples)
    found, rows, _ = scorer.of("aux" if "aux" in card["bns"] else "main", seen)
    if examples:
        sample.folder.write_table(sample.examples, pa.Table.from_pylist(examples))
    labels = np.array([row["class_index"] for row in rows], np.int64)
    record: dict[str, Any] = {**means(found, np.arange(len(labels)))}
    for column in ("kind", "style"):
        values = np.array([row[column] for row in rows])
        record[column] = {str(v): means(found, values == v) for v in np.unique(values) if v}
    record["context"] = by_scene(sample.scenes, rows, found["entropy"])
    record["classes"] = by_class(found, labels, names)
    record["accepted"] = accepted_shares(sample)
    return record


def _watched(
    rows: Iterable[dict[str, Any]], shown: tuple[str, ...], examples: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows as they come; the first ones of each class that is shown are kept as examples."""
    left = dict.fromkeys(shown, EXAMPLES)
    for row in rows:
        if left.get(row["class_name"], 0):
            left[row["class_name"]] -= 1
            examples.append({name: row[name] for name in ("sample_id", *TOLD, "image")})
        yield row


class _Scorer:
    """The models of a learner, and how images are made ready for them."""

    def __init__(
        self, learner: Folder, arm: str, card: dict[str, Any], device: str, max_pixels: int
    ) -> None:
        from ray_synth.training.model_files import card_transform

        self.learner, self.arm, self.card, self.device = learner, arm, card, device
        self.max_pixels, self.transform = max_pixels, card_transform(card)

    def of(
        self, bn: str, images: Iterable[dict[str, Any]]
    ) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], np.ndarray]:
        """Verdicts on the images that can be decoded, their rows without the images, and which of all
        could not be, (n,) bool."""
        from ray_synth.storage.classifiers import load_model

        model = load_model(self.learner, self.arm, bn, self.card).to(self.device)
        logits: list[np.ndarray] = []
        rows: list[dict[str, Any]] = []
        bad: list[bool] = []
        for some in _batches(images):
            answers, errors = self._answers(model, some)
            bad += [at in errors for at in range(len(some))]
            logits.append(answers)
            good = [row for at, row in enumerate(some) if at not in errors]
            rows += [{k: v for k, v in row.items() if k != "image"} for row in good]
        whole = np.concatenate([np.empty((0, len(self.card["class_names"]))), *logits])
        labels = np.array([row["class_index"] for row in rows], np.int64)
        return verdicts(whole, labels), rows, np.array(bad, bool)

    def _answers(self, model: Any, some: list[dict[str, Any]]) -> tuple[np.ndarray, set[int]]:
        import torch

        from ray_synth.training.decoder import decode_all

        encoded = [row["image"] for row in some]
        pixels, errors = decode_all(encoded, [0] * len(some), self.transform, self.max_pixels)
        good = [at for at in range(len(some)) if at not in errors]
        if not good:
            return np.empty((0, len(self.card["class_names"]))), set(errors)
        with torch.inference_mode():
            chosen = self.transform.batch(pixels[good].to(self.device))
            return model(chosen).float().cpu().numpy(), set(errors)


def _batches(images: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    rest = iter(images)
    while some := list(islice(rest, BATCH)):
        yield some
