"""Runs trained models over test sets through Ray Data; every image is counted exactly once.

All models see the same decoded batch, so adding a model needs no second read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_synth import metrics
from ray_synth.config import EvaluationConfig
from ray_synth.data.dataset import Index, to_ray
from ray_synth.errors import UserError, shortened
from ray_synth.evaluation.accuracy import VERDICT, Tally, judge
from ray_synth.monitoring import logs
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")


class Predictor:
    """An actor that holds the models of some arms and says which images each got right.

    Args:
        folder: the run directory.
        arms: names of `models/<arm>.json`.
        allowed: test set -> class indices to choose among.
        bns: which of a dual-BN model's exports are tested.
        board: the progress board's handle.
    """

    def __init__(
        self,
        folder: Folder,
        arms: list[str],
        max_pixels: int,
        allowed: dict[str, np.ndarray] | None = None,
        bns: Sequence[str] = ("main", "aux"),
        board: Any = None,
    ) -> None:
        import torch

        from ray_synth.device import pick_device
        from ray_synth.training.decoder import Decoder
        from ray_synth.training.model_files import card_transform, load_model

        metrics.join(folder.uri)
        logs.forward(board, stage="evaluation")
        self.allowed = allowed or {}
        self.device = pick_device("auto")
        if self.device == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)
        self.models: dict[str, Any] = {}
        for arm in arms:
            card = folder.read_json(f"models/{arm}.json")
            for bn in [bn for bn in card["bns"] if bn in bns or len(card["bns"]) == 1]:
                name = arm if len(card["bns"]) == 1 else f"{arm}.{bn}"
                if arm == "mixed" and card["bns"] == ["main"]:
                    name = "mixed.main"
                self.models[name] = load_model(folder, arm, bn, card).to(self.device)
            self.transform = card_transform(card)
        self.decoder = Decoder(self.transform, max_pixels)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        import torch

        count = len(batch["class_index"])
        items = [
            self.decoder.keep({key: values[i] for key, values in batch.items()})
            for i in range(count)
        ]
        good = [i for i, item in enumerate(items) if item is not None]
        output: dict[str, Any] = {
            "test_set": batch["test_set"],
            "class_index": batch["class_index"],
            "image_id": batch["image_id"],
            "corrupt": np.array([item is None for item in items]),
        }
        images = None
        if good:
            batch_of = self.decoder.batch([item for item in items if item is not None])
            images = self.transform.batch(batch_of.images.to(self.device))
        for name, model in self.models.items():
            verdicts = np.zeros((count, len(VERDICT)))
            if images is not None:
                with torch.inference_mode():
                    logits = model(images).float().cpu().numpy()
                verdicts[good] = self._judge(logits, batch, np.array(good))
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
    """
    import ray.data

    for name, index in test_sets.items():
        warn_of_missing(name, index)
    allowed = {name: np.unique(index.label) for name, index in test_sets.items()}
    datasets = [to_ray(index, test_set=name) for name, index in test_sets.items()]
    images = datasets[0].union(*datasets[1:]) if datasets[1:] else datasets[0]
    stream = images.map_batches(
        Predictor,
        fn_constructor_kwargs={
            "folder": folder,
            "arms": arms,
            "max_pixels": max_pixels,
            "allowed": allowed,
            "bns": config.bns,
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
    return tally.results(class_names), corrupt


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
