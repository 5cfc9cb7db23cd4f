"""Runs trained models over test sets through Ray Data; every image is counted exactly once.

Images are decoded where they are read, on the CPUs of all nodes, while others are tested. All models see
the same decoded batch, so adding a model needs no second read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_synth import metrics
from ray_synth.config import EvaluationConfig
from ray_synth.data.dataset import Index, to_ray
from ray_synth.errors import UserError, shortened
from ray_synth.evaluation.accuracy import VERDICT, Tally, judge
from ray_synth.monitoring import logs
from ray_synth.storage.folder import Folder

if TYPE_CHECKING:
    import ray.data

log = logging.getLogger("ray_synth")
FEW = 5_000  # images that are decoded by the predictor: a task loads torch first, which takes 3 s
Columns = dict[str, Any]


def prepare(batch: Columns, *, card: dict[str, Any], max_pixels: int) -> Columns:
    """Encoded images of a block to `pixels`, (n, 3, size, size) uint8, and `corrupt`, (n,) bool.

    Args:
        batch: columns of `to_ray`.
        card: of the model that they are for.
    """
    from ray_synth.training.decoder import decode_all
    from ray_synth.training.model_files import card_transform

    count = len(batch["class_index"])
    pixels, errors = decode_all(batch["image"], [0] * count, card_transform(card), max_pixels)
    corrupt = np.zeros(count, dtype=bool)
    corrupt[[*errors]] = True
    pixels[corrupt] = 0
    kept = {key: values for key, values in batch.items() if key != "image"}
    return {**kept, "pixels": np.ascontiguousarray(pixels), "corrupt": corrupt}


class Predictor:
    """An actor that holds the models of some arms and says which images each got right.

    Args:
        folder: the run directory.
        arms: names of `models/<arm>.json`.
        allowed: test set -> class indices to choose among.
        config: which of a dual-BN model's exports are tested, and in which precision.
        board: the progress board's handle.
    """

    def __init__(
        self,
        folder: Folder,
        arms: list[str],
        max_pixels: int,
        allowed: dict[str, np.ndarray] | None = None,
        config: EvaluationConfig | None = None,
        board: Any = None,
    ) -> None:
        import torch

        from ray_synth.device import pick_device, pick_dtype
        from ray_synth.storage.classifiers import load_model
        from ray_synth.training.model_files import card_transform

        metrics.join(folder.uri)
        logs.forward(board, stage="evaluation")
        self.allowed = allowed or {}
        config = config or EvaluationConfig()
        self.device = pick_device("auto")
        self.dtype = pick_dtype(config.dtype, self.device)
        if self.device == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)
        else:
            torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it anyway
        self.models: dict[str, Any] = {}
        for arm in arms:
            card = folder.read_json(f"models/{arm}.json")
            for bn in [bn for bn in card["bns"] if bn in config.bns or len(card["bns"]) == 1]:
                name = arm if len(card["bns"]) == 1 else f"{arm}.{bn}"
                if arm == "mixed" and card["bns"] == ["main"]:
                    name = "mixed.main"
                self.models[name] = load_model(folder, arm, bn, card).to(self.device)
        self.prepare = partial(prepare, card=card, max_pixels=max_pixels)
        self.transform = card_transform(card)

    def __call__(self, batch: Columns) -> Columns:
        import torch

        if "pixels" not in batch:
            batch = self.prepare(batch)
        good = np.flatnonzero(~batch["corrupt"])
        count = len(batch["corrupt"])
        output = {name: batch[name] for name in ("test_set", "class_index", "image_id", "corrupt")}
        images = None
        if len(good):
            pixels = torch.from_numpy(batch["pixels"].take(good, axis=0)).to(self.device)
            images = self.transform.batch(pixels)
        half = self.dtype is not torch.float32
        for name, model in self.models.items():
            verdicts = np.zeros((count, len(VERDICT)))
            if images is not None:
                with (
                    torch.inference_mode(),
                    torch.autocast(self.device, self.dtype, enabled=half),
                ):
                    logits = model(images).float().cpu().numpy()
                verdicts[good] = self._judge(logits, batch, good)
            output[f"model/{name}"] = verdicts
        metrics.record("evaluated_images_total", count)
        return output

    def _judge(
        self, logits: np.ndarray, batch: dict[str, np.ndarray], rows: np.ndarray
    ) -> np.ndarray:
        verdicts = np.zeros((len(rows), len(VERDICT)))
        for test_set in np.unique(batch["test_set"][rows]):
            mine = np.flatnonzero(batch["test_set"][rows] == test_set)
            labels = batch["class_index"][rows[mine]]
            verdicts[mine] = judge(logits[mine], labels, self.allowed.get(str(test_set)))
        return verdicts


def evaluate(
    test_sets: dict[str, Index],
    *,
    folder: Folder,
    arms: list[str],
    config: EvaluationConfig,
    class_names: tuple[str, ...],
    max_pixels: int,
    board: Any = None,
) -> tuple[dict[tuple[str, str], dict[str, Any]], list[str]]:
    """Test the arms' models on every test set.

    Returns:
        Results by (model, test set), and the ids of test images that could not be decoded.

    Raises:
        UserError: a test set has no image that can be used.
    """
    import ray.data

    for name, index in test_sets.items():
        warn_of_missing(name, index)
    allowed = {name: np.unique(index.label) for name, index in test_sets.items()}
    card = folder.read_json(f"models/{arms[-1]}.json")
    decode = partial(prepare, card=card, max_pixels=max_pixels)
    stream = _read(test_sets, decode, config.batch_size).map_batches(
        Predictor,
        fn_constructor_kwargs={
            "folder": folder,
            "arms": arms,
            "max_pixels": max_pixels,
            "allowed": allowed,
            "config": config,
            "board": board,
        },
        batch_size=config.batch_size,
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
    )
    tally, corrupt = Tally(len(class_names)), []
    for batch in stream.iter_batches(batch_size=None, batch_format="numpy"):
        bad = batch["corrupt"].astype(bool)
        corrupt += [str(name) for name in batch["image_id"][bad]]
        for test_set in np.unique(batch["test_set"]):
            rows = (batch["test_set"] == test_set) & ~bad
            labels = batch["class_index"][rows]
            verdicts = {
                key.removeprefix("model/"): values[rows]
                for key, values in batch.items()
                if key.startswith("model/")
            }
            if len(labels):
                tally.add_all(str(test_set), labels, verdicts)
        if board is not None:
            board.add.remote("tested", len(bad))
    results = tally.results(class_names)
    require_results(test_sets, results, corrupt)
    return results, corrupt


def require_results(
    test_sets: Iterable[str], results: dict[tuple[str, str], Any], corrupt: list[str]
) -> None:
    """Raises UserError where a test set has none: each of its images was corrupt."""
    tested = {test_set for _, test_set in results}
    for name in test_sets:
        if name not in tested:
            raise UserError(
                f"test set {name!r} has no results: not one of its images can be used (such as "
                f"{shortened(corrupt, 3)}). What was trained is kept: fix the set, and run the same "
                "command again"
            )


def _read(
    test_sets: dict[str, Index], decode: Callable[[Columns], Columns], batch_size: int
) -> ray.data.Dataset:
    """All test images, decoded unless they are few."""
    many = sum(map(len, test_sets.values())) > FEW
    datasets = []
    for name, index in test_sets.items():
        images = to_ray(index, test_set=name)
        # Ray Data makes one task of reading and decoding.
        datasets.append(images.map_batches(decode, batch_size=batch_size) if many else images)
    return datasets[0].union(*datasets[1:]) if datasets[1:] else datasets[0]


def warn_of_missing(test_set: str, index: Index) -> None:
    """Say which classes a test set has no image of; raise where it has none at all.

    Raises:
        UserError: the test set is empty.
    """
    counts = index.counts()
    missing = [name for name, count in counts.items() if not count]
    if len(missing) == len(counts):
        raise UserError(f"test set {test_set!r} has no image of any class; check its path")
    if missing:
        log.warning(
            "test set %r has no image of %d of %d classes (%s): it is tested on the others",
            test_set,
            len(missing),
            len(counts),
            shortened(missing, 5),
        )
