"""LoRA files and textual inversions for the tiny pipelines, made as their trainers make them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYERS = ["to_q", "to_v", "to_query", "to_value"]  # Kandinsky 5 spells them out
RANK = 2


def save_lora(
    pipeline: Any,
    folder: Path,
    *,
    seed: int = 0,
    scale: float = 1.0,
    alpha: int = RANK,
    **more: Any,
) -> Path:
    """A LoRA with random numbers for a pipeline's denoiser, written by its own class.

    The pipeline itself keeps no trace of it.
    """
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    part = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    denoiser = getattr(pipeline, part)
    config = LoraConfig(
        r=RANK, lora_alpha=alpha, init_lora_weights=False, target_modules=LAYERS, **more
    )
    denoiser.add_adapter(config, adapter_name="made")
    weights = {
        name: value * scale if "lora_B" in name else value
        for name, value in get_peft_model_state_dict(denoiser, adapter_name="made").items()
    }
    save = type(pipeline).save_lora_weights
    header = {f"{part}_lora_adapter_metadata": denoiser.peft_config["made"].to_dict()}
    known = inspect.signature(save).parameters
    save(
        folder,
        **{f"{part}_lora_layers": weights},
        **{name: value for name, value in header.items() if name in known},
    )
    denoiser.delete_adapters("made")
    denoiser.unload_lora()
    return folder


def save_words(path: Path, seed: int = 0, **vectors: int | tuple[int, int]) -> Path:
    """A textual inversion: name of each tensor -> its shape, (vectors, width) or the width of one."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.randn(shape) for name, shape in vectors.items()}, path)
    return path
