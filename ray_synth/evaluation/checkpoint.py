"""Any timm model on the test sets of a config: no run needs to have trained it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_synth.config import Config
from ray_synth.data.class_names import read_class_names
from ray_synth.data.dataset import load_index, load_tests, setting_of
from ray_synth.errors import UserError
from ray_synth.storage.folder import Folder
from ray_synth.storage.texts import read_json

log = logging.getLogger("ray_synth")


def evaluate_checkpoint(
    config: Config,
    folder: Folder,
    *,
    model: str,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    name: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Test a timm model on the config's in-domain and out-of-domain sets.

    Images are resized, cropped and normalised as timm's own config of the model says, or as the card
    beside a checkpoint of ours does. Writes `NAME.json` into the folder, and a card of the model.

    Args:
        folder: for the results, `evaluations/` of a run.
        checkpoint: a safetensors file: one of a run's `models/`, or any that timm loads.
        pretrained: test timm's own weights instead.
        name: default: the file's name, or the model's.

    Returns:
        test set -> top1, top5, intervals, calibration, by class (see `accuracy.Tally`).

    Raises:
        UserError: an unknown model, a checkpoint that does not fit, or not exactly one of
            `checkpoint` and `pretrained`.
    """
    from ray_synth.cluster.connection import connect
    from ray_synth.evaluation.predictor import evaluate

    if (checkpoint is None) == (not pretrained):
        raise UserError("give either --checkpoint FILE.safetensors or --pretrained")
    names = read_class_names(config.data.class_names)
    numbering: tuple[str, ...] = ()
    if names is None:
        train = load_index(config.data.train)
        names, numbering = train.class_names, train.numbering
    # It names files, which are neither hidden nor too long.
    name = re.sub(r"[^A-Za-z0-9._-]", "-", name or (checkpoint.stem if checkpoint else model))
    name = name[:100].lstrip(".") or "model"
    card = _card(model, names, checkpoint, pretrained)
    folder.write_json(f"models/{name}.json", card)
    if checkpoint is not None:
        folder.write_bytes(f"models/{name}.main.safetensors", checkpoint.read_bytes())
    tests = load_tests(config.data, names, config.seed, numbering=numbering)
    for key, index in tests.items():
        for line in index.left_out.told(setting_of(key), names):
            log.warning("%s", line)
    with connect(config.cluster):
        found, corrupt = evaluate(
            tests,
            folder=folder,
            arms=[name],
            config=config.evaluation,
            class_names=names,
            max_pixels=config.data.max_pixels,
        )
    results = {test_set: result for (_, test_set), result in found.items()}
    folder.write_json(f"{name}.json", {"model": model, "results": results, "corrupt": corrupt})
    return results


def _card(
    model: str, class_names: Sequence[str], checkpoint: Path | None, pretrained: bool
) -> dict[str, Any]:
    """What the predictor must know of the model; it is built once, to refuse here what is wrong."""
    from ray_synth.training import recipe

    ours = _card_of(checkpoint)
    kwargs = ours.get("model_kwargs", {})
    built = recipe.build_model(
        model,
        num_classes=len(class_names),
        checkpoint=checkpoint,
        pretrained=pretrained,
        model_kwargs=kwargs,
        keep_classifier=True,
    )
    data = recipe.data_config(built)
    images = {
        "image_size": data["input_size"][-1],
        **{key: data[key] for key in ("crop_pct", "mean", "std", "interpolation")},
    }
    return {
        "model": model,
        "model_kwargs": kwargs,
        "pretrained": pretrained,
        "class_names": list(class_names),
        **{key: ours.get(key, value) for key, value in images.items()},
        "bns": ["main"],
    }


def _card_of(checkpoint: Path | None) -> dict[str, Any]:
    """What a run of ours wrote beside its weights (`mixed.json` for `mixed.main.safetensors`)."""
    if checkpoint is None:
        return {}
    path = checkpoint.with_name(f"{checkpoint.name.split('.')[0]}.json")
    return read_json(path) if path.is_file() else {}
