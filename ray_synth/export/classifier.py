"""A trained model ready to answer: of a run's directory, or of a folder that `export --model` wrote.

Names in; what turns pixels into probabilities, with its class names and its way of preparing pictures,
out. Nothing of a folder is unpickled or run: weights are safetensors or ONNX, and settings are checked.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_synth.data.marks import ValueRange
from ray_synth.errors import UserError, first_line
from ray_synth.export.weights import Weights, choose_weights, value_range_of
from ray_synth.storage.folder import Folder
from ray_synth.storage.texts import as_json

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ray_synth.training.augmentation import ImageTransform

ABOUT = "model.json"  # of an exported folder; written last
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "timm": "model.safetensors"}
PREPARING = ("image_size", "mean", "std", "interpolation", "crop_pct")


@dataclass(frozen=True)
class Classifier:
    """What answers.

    Attributes:
        class_names: of each class index.
        transform: prepares a picture to pixels.
        classify: (n, 3, size, size) uint8 RGB to (n, classes) float32 probabilities.
        told: what it is, for people.
        value_range: the values of greys that are black and white; default: by their type.
    """

    class_names: list[str]
    transform: ImageTransform
    classify: Callable[[np.ndarray], np.ndarray]
    told: str
    value_range: ValueRange | None = None


def open_classifier(place: str, weights: str | None = None) -> Classifier:
    """The model of a run, or of an exported folder; local, or in a bucket.

    Args:
        weights: of a run, see `choose_weights`.

    Raises:
        UserError: there is neither, or its files are not whole.
    """
    folder = Folder(place)
    folder.check_readable()
    if folder.exists("config.yaml"):
        return _of_run(choose_weights(folder, weights))
    if weights:
        raise UserError(f"--weights {weights}: {folder.address()} is no run, and has one model")
    if folder.exists(FILES["onnx"]):
        return _of_onnx(folder)
    if folder.exists(FILES["timm"]):
        return _of_timm(folder)
    if folder.exists(FILES["torch"]):
        raise UserError(
            f"{folder.address(FILES['torch'])}: torch.export files may hold pickled Python, which is not "
            "loaded here; export with --model onnx or --model timm, or give the run's directory"
        )
    raise UserError(
        f"{folder.address()} is neither a run's directory (no config.yaml) nor a folder that "
        "`ray-synth export --model onnx` or `--model timm` wrote"
    )


def _of_run(weights: Weights) -> Classifier:
    told = f"{weights.card['model']}, {weights.name} of {weights.folder.address()}"
    return _eager(weights.load(), weights.card, told, weights.value_range)


def _of_timm(folder: Folder) -> Classifier:
    """A folder as timm itself keeps models: config.json and model.safetensors."""
    model, card = read_timm(folder)
    about = folder.read_json(ABOUT) if folder.exists(ABOUT) else {}
    return _eager(model, card, f"{card['model']} of {folder.address()}", _range_in(about))


def _range_in(about: Any) -> ValueRange | None:
    made = about.get("preprocessing") if isinstance(about, dict) else None
    return value_range_of(made.get("value_range")) if isinstance(made, dict) else None


def read_timm(folder: Folder, *, own: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a timm folder, and a card as training writes them.

    Args:
        own: the folder was written by this process, and may set whatever the run's config does.

    Raises:
        UserError: its config.json asks for what a checkpoint may not decide, or a file is not whole.
    """
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import load

    from ray_synth.training.recipe import build_model

    origin = folder.address("config.json")
    if not folder.exists("config.json"):
        raise UserError(f"{origin} is missing: it says what the weights beside it are of")
    data = folder.read_bytes("config.json")
    card = _timm_card(as_json(data, origin), origin)
    with tempfile.TemporaryDirectory() as local:
        # Its settings alone: the weights are read here, and no other file of it is.
        Path(local, "config.json").write_bytes(data)
        # `build_model` refuses what a checkpoint may not decide.
        build = timm.create_model if own else build_model
        model = build(f"local-dir:{local}", num_classes=len(card["class_names"]))
    try:
        model.load_state_dict(load(folder.read_bytes(FILES["timm"])))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{folder.address(FILES['timm'])} does not fit config.json beside it ({first_line(error)}); "
            "export or fetch it again"
        ) from None
    return model.eval(), card


def _timm_card(config: Any, origin: str) -> dict[str, Any]:
    try:
        made = config["pretrained_cfg"]
        return _checked(
            {
                "model": config["architecture"],
                "class_names": config["label_names"],
                "image_size": made["input_size"][-1],
                **{key: made[key] for key in PREPARING[1:]},
            },
            origin,
        )
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{origin} lacks what a classifier needs ({first_line(error)}): architecture, label_names, "
            "and input_size, mean, std, interpolation and crop_pct in pretrained_cfg"
        ) from None


def _checked(card: dict[str, Any], origin: str) -> dict[str, Any]:
    """The card as it is. Raises UserError where a value is not of its kind."""

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and [type(v) in (int, float) for v in value] == [True] * 3

    names, size, crop = card["class_names"], card["image_size"], card["crop_pct"]
    good = {
        "class_names": isinstance(names, list) and names and all(isinstance(n, str) for n in names),
        "image_size": type(size) is int and 0 < size <= 4096,
        "crop_pct": type(crop) in (int, float) and 0 < crop <= 4,
        "mean": numbers(card["mean"]),
        "std": numbers(card["std"]) and 0 not in card["std"],
        "interpolation": isinstance(card["interpolation"], str),
        "model": isinstance(card["model"], str),
    }
    for key, fine in good.items():
        if not fine:
            raise UserError(f"{origin}: {key} is not what it should be: {str(card[key])[:80]!r}")
    return card


def _eager(
    model: nn.Module, card: dict[str, Any], told: str, value_range: ValueRange | None
) -> Classifier:
    import torch

    from ray_synth.device import pick_device
    from ray_synth.training.deployed import Deployed
    from ray_synth.training.model_files import card_transform

    device = pick_device("auto")
    deployed = Deployed(model, mean=card["mean"], std=card["std"]).to(device)

    def classify(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return deployed(torch.from_numpy(pixels).to(device))[1].cpu().numpy()

    names = list(card["class_names"])
    return Classifier(names, card_transform(card), classify, told, value_range)


def _of_onnx(folder: Folder) -> Classifier:
    from ray_synth.training.model_files import card_transform

    origin = folder.address(ABOUT)
    if not folder.exists(ABOUT):
        raise UserError(f"{origin} is missing: it has the class names; export the model again")
    about = folder.read_json(ABOUT)
    try:
        card = {"model": about["model"], "class_names": about["class_names"]}
        card = _checked({**card, **{key: about["preprocessing"][key] for key in PREPARING}}, origin)
    except (KeyError, TypeError) as error:
        raise UserError(f"{origin} lacks {first_line(error)}; export the model again") from None
    run = onnx_session(folder.read_bytes(FILES["onnx"]), folder.address(FILES["onnx"]))
    told = f"{card['model']} as ONNX, of {folder.address()}"
    names, transform = card["class_names"], card_transform(card)
    return Classifier(names, transform, lambda x: run(x)[1], told, _range_in(about))


def onnx_session(data: bytes, origin: str) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Pixels to logits and probabilities by ONNX Runtime, on the CPU.

    Raises:
        UserError: ONNX Runtime is not installed, or does not take the file.
    """
    require_onnx("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own C++ module
        raise UserError(f"{origin} is no ONNX model that can be run: {first_line(error)}") from None
    return lambda pixels: tuple(session.run(["logits", "probabilities"], {"images": pixels}))


def require_onnx(*packages: str) -> None:
    """Raises UserError where one of them is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}, which is not installed: pip install 'ray-synth[onnx]'"
        )
