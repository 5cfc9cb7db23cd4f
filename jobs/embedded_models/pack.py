"""Stage `pack`: the trained models as they are shipped, most weights in eight bits.

In: `work/sd`, `work/clip`, `work/tokenizer`. Out: `work/weights/sd` and `work/weights/clip`.
"""

import json
import shutil
from pathlib import Path

import torch

from jobs.embedded_models.settings import Settings

EIGHT_BITS = torch.float8_e4m3fn
LARGE = 4096  # numbers below which a tensor stays in half precision
# Safetensors files that are stored in eight bits. The VAE is not among them: its errors are
# seen in every picture, and it is small.
IN_EIGHT_BITS = (
    "sd/unet/diffusion_pytorch_model.safetensors",
    "sd/text_encoder/model.safetensors",
    "clip/open_clip_model.safetensors",
)


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is stored: large matrices and convolutions in float8 (e4m3), others in fp16.

    There are no scales: trained weights lie well within the largest float8, 448. Loaders cast
    them to the dtype that is asked for.

    Raises:
        ValueError: a weight is too large for float8, or not a number.
    """
    if not tensor.is_floating_point():
        return tensor
    if tensor.ndim < 2 or tensor.numel() < LARGE:
        return tensor.half()
    largest = tensor.abs().max().item()
    if not largest <= torch.finfo(EIGHT_BITS).max:
        raise ValueError(f"A weight of {largest} does not fit float8: training has diverged.")
    return tensor.to(EIGHT_BITS)


def store_in_eight_bits(path: Path) -> None:
    """Rewrites a safetensors file with `stored` weights."""
    from safetensors.torch import load_file, save_file

    weights = {name: stored(tensor) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def forget_origin(path: Path) -> None:
    """Takes the folder that a model was loaded from out of its config: it means nothing here."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def pack(settings: Settings) -> Path:
    """Writes the two folders of the package; returns the folder that holds them."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        settings.output_of("distillation", "sd"),
        dtype=torch.float16,
        safety_checker=None,
        requires_safety_checker=False,
    )
    folder = settings.work / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder / "sd")
    shutil.copytree(settings.output_of("clip", "clip"), folder / "clip")
    tokenizer = settings.output_of("tokenizer", "tokenizer")
    shutil.copytree(tokenizer, folder / "clip", dirs_exist_ok=True)
    for name in IN_EIGHT_BITS:
        store_in_eight_bits(folder / name)
    for config in [*folder.glob("sd/*/config.json"), folder / "sd" / "model_index.json"]:
        forget_origin(config)
    return folder
