"""A run's trained model as a file for other programs: ONNX, torch.export, or a folder of timm.

Weights of a run in; a folder with the model, its class names and how its pictures are prepared out. What
is written is read again and held against the eager model on pictures before it is called done.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from ray_synth.errors import UserError, first_line
from ray_synth.export.classifier import (
    ABOUT,
    FILES,
    PREPARING,
    onnx_session,
    read_timm,
    require_onnx,
)
from ray_synth.export.comparison import TOLERANCE, Checked, Run, check_pixels, compare, eager
from ray_synth.export.weights import Weights
from ray_synth.storage.folder import Folder

MODEL_FORMATS = tuple(FILES)
LARGEST_ONNX = 1_900_000_000  # bytes of weights in one file, which protobuf keeps below 2 GiB


def export_model(
    weights: Weights, to: Folder, *, form: str, pictures: list[str] | None = None
) -> Checked:
    """Write a model, with model.json beside it, into a folder of its own.

    Args:
        to: empty, or with an earlier export of the same form, which is replaced.
        form: onnx, torch or timm.
        pictures: files or folders to check it on; default: test images of the run, or, where these are
            not at hand, its own synthetic ones.

    Raises:
        UserError: an unknown form, a folder that holds something else, a package that is missing, or
            a model whose answers are not those of the eager one.
    """
    if form not in MODEL_FORMATS:
        raise UserError(f"unknown model format {form!r}: one of {', '.join(MODEL_FORMATS)}")
    if form == "onnx":
        require_onnx("onnx", "onnxscript", "onnxruntime")
    _claim(to, form)
    shown, of = check_pixels(weights, pictures)
    files, run = _MAKERS[form](weights)
    checked = compare(eager(weights), run, shown, of)
    if not checked.equal:
        raise UserError(
            f"the {form} model is not the trained one: a logit differs by {checked.difference:.3g} on "
            f"{checked.pictures} {of} (at most {TOLERANCE:g} of {checked.largest:.3g} is let pass); "
            "nothing was written"
        )
    to.delete(ABOUT)  # while the others are replaced there is no whole model
    for name, data in files.items():
        to.write_bytes(name, data)
    to.write_json(ABOUT, _about(weights, form, checked))
    return checked


# The forms. Each gives the files, and what runs them as they will be read.


def _torch(weights: Weights) -> tuple[dict[str, bytes], Run]:
    """A program of torch.export. The example that it keeps is blank, none of the user's pictures."""
    import torch

    buffer = io.BytesIO()
    torch.export.save(_program(weights), buffer)
    buffer.seek(0)
    module = torch.export.load(buffer).module()  # written here a moment ago

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(pixels))[0].numpy()

    return {FILES["torch"]: buffer.getvalue()}, run


def _program(weights: Weights) -> Any:
    import torch

    size = weights.card["image_size"]
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    try:
        program = torch.export.export(
            eager(weights), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    except Exception as error:  # of the model's own code, which torch follows
        raise UserError(
            f"torch.export cannot follow {weights.card['model']} ({first_line(error)}); "
            "take --model timm"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def _onnx(weights: Weights) -> tuple[dict[str, bytes], Run]:
    import torch

    model = eager(weights)
    size = sum(value.nbytes for value in model.state_dict().values())
    if size > LARGEST_ONNX:
        raise UserError(
            f"{weights.card['model']} has {size / 1e9:.1f} GB of weights, and an ONNX file holds 2: take "
            "--model torch or --model timm"
        )
    program = torch.onnx.export(
        _program(weights),
        input_names=["images"],
        output_names=["logits", "probabilities"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    _name_batch(program)
    data = program.model_proto.SerializeToString()
    session = onnx_session(data, FILES["onnx"])
    return {FILES["onnx"]: data}, lambda pixels: session(pixels)[0]


def _timm(weights: Weights) -> tuple[dict[str, bytes], Run]:
    """As timm keeps models on a hub: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    import torch
    from safetensors.torch import save

    from ray_synth.training.deployed import Deployed

    model = weights.load()
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    files = {
        "config.json": json.dumps(timm_config(model, weights.card), indent=2).encode(),
        FILES["timm"]: save(tensors, {"format": "pt"}),
    }
    with tempfile.TemporaryDirectory() as local:
        for name, data in files.items():
            Path(local, name).write_bytes(data)
        found, card = read_timm(Folder(local), own=True)
    again = Deployed(found, mean=card["mean"], std=card["std"])

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return again(torch.from_numpy(pixels))[0].numpy()

    return files, run


_MAKERS: dict[str, Callable[[Weights], tuple[dict[str, bytes], Run]]] = {
    "onnx": _onnx, "torch": _torch, "timm": _timm,
}  # fmt: skip
# What timm knows of weights of its own, and which these are not.
_OF_OTHERS = ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes", "description",
              "hf_hub_id", "url", "label_names", "label_descriptions")  # fmt: skip


def timm_config(model: Any, card: dict[str, Any]) -> dict[str, Any]:
    """config.json as timm writes it, with the class names and how this model's pictures are prepared."""
    from timm.models._hub import save_config_for_hf

    size = card["image_size"]
    with tempfile.TemporaryDirectory() as local:
        save_config_for_hf(
            model,
            f"{local}/config.json",
            model_config={"label_names": card["class_names"]},
            data_config={
                "input_size": (3, size, size),
                **{key: card[key] for key in PREPARING[1:]},
            },
        )
        config = json.loads(Path(local, "config.json").read_bytes())
    made = config["pretrained_cfg"]
    config["pretrained_cfg"] = {k: v for k, v in made.items() if k not in _OF_OTHERS}
    return config


def _name_batch(program: Any) -> None:
    """Call the free dimension `batch`, whatever torch called it."""
    graph = program.model.graph
    for value in [*graph.inputs, *graph.outputs]:
        value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])


def _about(weights: Weights, form: str, checked: Checked) -> dict[str, Any]:
    """model.json: what the model takes and gives, for whoever runs it elsewhere."""
    card = weights.card
    size = card["image_size"]
    inside = form != "timm"
    return {
        "format": form,
        "file": FILES[form],
        "model": card["model"],
        "weights": weights.name,
        "class_names": card["class_names"],
        "preprocessing": {
            **{key: card[key] for key in PREPARING},
            "resize": round(size / card["crop_pct"]),  # the shorter side, antialiased
            "crop": size,  # the centre
            "channels": "RGB",
            "value_range": weights.value_range,  # of greys: black and white; null: by their type
            "normalised_inside": inside,
        },
        "input": {
            "name": "images",
            "type": "uint8" if inside else "float32",
            "shape": ["batch", 3, size, size],
        },
        "outputs": ["logits", "probabilities"] if inside else ["logits"],
        "checked": {
            "pictures": checked.pictures,
            "of": checked.of,
            "max_difference": checked.difference,
            "largest_logit": checked.largest,
        },
    }


def _claim(to: Folder, form: str) -> None:
    """Raises UserError where a folder holds anything but an earlier model of the same form."""
    to.check_readable()
    kind = to.filesystem.get_file_info(to.path()).type
    if kind == pafs.FileType.File:
        raise UserError(f"{to.address()} is a file; give a folder to export into")
    names = to.names()
    own = {ABOUT, FILES[form], *(("config.json", "README.md") if form == "timm" else ())}
    others = sorted({*names} - own)
    if others:
        raise UserError(
            f"{to.address()} is not empty and holds no {form} model (there is {others[0]}); give a new "
            "or an empty folder"
        )
