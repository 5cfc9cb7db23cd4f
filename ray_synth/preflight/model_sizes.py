"""How large models are: parameters, weights, and the outputs of a forward pass.

Weights are counted from the headers of safetensors files: in a folder, in the hub's cache, or on the
hub itself, so that a run is judged alike before its models are downloaded and after. What is in none of
them is said to be unknown.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from ray_synth.config import TrainingConfig
from ray_synth.errors import UserError
from ray_synth.preflight.hub_models import hub_parameters
from ray_synth.storage.hub import is_hub_id
from ray_synth.storage.texts import IS_POINTER, as_json, is_pointer, read_json


def frozen(training: TrainingConfig) -> tuple[str, int]:
    return json.dumps(training.model_kwargs, sort_keys=True), training.image_size


@lru_cache(maxsize=8)
def classifier_size(model: str, settings: tuple[str, int], classes: int) -> tuple[int, int]:
    """Parameters of a timm model, and the numbers that its layers put out for one image.

    A forward pass on torch's meta device, which computes nothing. Outputs are 0 where it cannot be
    done there.
    """
    import torch

    from ray_synth.training import recipe

    kwargs, image_size = json.loads(settings[0]), settings[1]
    with torch.device("meta"):
        built = recipe.build_model(model, num_classes=classes, model_kwargs=kwargs)
    parameters = sum(p.numel() for p in built.parameters())
    outputs = 0

    def add(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal outputs
        outputs += output.numel() if isinstance(output, torch.Tensor) else 0

    for module in built.modules():
        if not list(module.children()):
            module.register_forward_hook(add)
    try:
        with torch.no_grad():
            built.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    except (RuntimeError, NotImplementedError, AssertionError):
        outputs = 0
    return parameters, outputs


def parameters_of(model: str, revision: str | None) -> int | str:
    """Numbers in a model's weights; or why they cannot be counted."""
    folder = model_folder(model, revision)
    if folder is not None:
        return stored_parameters(folder) or "it has no safetensors files"
    if not is_hub_id(model):
        return 0  # a .gguf file; or nothing at all, which is refused elsewhere
    return hub_parameters(model, revision)


def weights_bytes(model: str, revision: str | None, size: int) -> int:
    """Bytes of a model's weights at `size` bytes each; 0 where that is not known."""
    found = parameters_of(model, revision)
    return 0 if isinstance(found, str) else size * found


def model_folder(model: str, revision: str | None = None) -> Path | None:
    """Where a diffusers or transformers model lies on this machine; None where it does not."""
    if model == "embedded":
        from ray_synth.embedded import sd_folder

        return sd_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(model):
        return None
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", "config.json"):
        found = try_to_load_from_cache(model, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def stored_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a model's folder; of variants of a part, one is counted."""
    return sum(parts_parameters(folder).values())


def parts_parameters(folder: Path) -> dict[str, int]:
    """As `stored_parameters`, for each folder that has some."""
    found = {}
    for part in {path.parent for path in folder.rglob("*.safetensors")}:
        plain = [p for p in part.glob("*.safetensors") if ".fp16." not in p.name]
        found[part.name] = sum(_numbers(path) for path in plain or part.glob("*.safetensors"))
    return found


def _numbers(path: Path) -> int:
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        text = file.read(min(length, path.stat().st_size))
    if is_pointer(start + text):
        raise UserError(f"{path} is {IS_POINTER}")
    if len(text) < length:
        raise UserError(f"{path} is not a whole safetensors file; fetch the model again")
    header = as_json(text, str(path))
    return sum(
        math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
    )


def vae_channels(model: str) -> int:
    folder = model_folder(model)
    config = folder / "vae" / "config.json" if folder else None
    if config is None or not config.is_file():
        return 128  # of all Stable Diffusions
    return int(read_json(config).get("block_out_channels", [128])[0])
