"""LoRA files, textual inversions and IP-Adapters for the tiny pipelines, as their trainers make them."""

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


IMAGE_WIDTH = 24  # of what the image encoder says of an image; 32 of each of its patches


def save_ip_adapter(pipeline: Any, folder: Path, *, seed: int = 0, patches: bool = False) -> Path:
    """An IP-Adapter with random numbers for a pipeline's UNet, and its image encoder beside it.

    Args:
        patches: of the kind that reads every patch ("plus").
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    unet = pipeline.unet
    width = unet.config.cross_attention_dim
    held = {}
    for number, (name, _) in enumerate(unet.attn_processors.items()):
        if "attn2" in name:
            keys = unet.get_submodule(name.removesuffix(".processor")).to_k.weight
            for part in ("k", "v"):
                held[f"ip_adapter.{number}.to_{part}_ip.weight"] = torch.randn(keys.shape)
    if patches:
        held |= _resampler(width)
    else:
        held["image_proj.proj.weight"] = torch.randn(4 * width, IMAGE_WIDTH)
        held["image_proj.proj.bias"] = torch.randn(4 * width)
        held["image_proj.norm.weight"] = torch.ones(width)
        held["image_proj.norm.bias"] = torch.zeros(width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(held, folder / "ip-adapter.safetensors")
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, projection_dim=IMAGE_WIDTH, num_hidden_layers=2,
            num_attention_heads=4, image_size=32, patch_size=8,
        )
    )  # fmt: skip
    encoder.save_pretrained(folder / "image_encoder", safe_serialization=True)
    return folder


def _resampler(width: int, inner: int = 64, tokens: int = 3) -> dict[str, torch.Tensor]:
    """The part of a "plus" IP-Adapter that reads patches, in its own names."""
    shapes = {
        "latents": (1, tokens, inner),
        "proj_in.weight": (inner, 32), "proj_in.bias": (inner,),
        "proj_out.weight": (width, inner), "proj_out.bias": (width,),
        "norm_out.weight": (width,), "norm_out.bias": (width,),
    }  # fmt: skip
    of_layer = {
        "0.norm1.weight": (inner,), "0.norm1.bias": (inner,), "0.norm2.weight": (inner,),
        "0.norm2.bias": (inner,), "0.to_q.weight": (inner, inner), "0.to_kv.weight": (2 * inner, inner),
        "0.to_out.weight": (inner, inner), "1.0.weight": (inner,), "1.0.bias": (inner,),
        "1.1.weight": (4 * inner, inner), "1.3.weight": (inner, 4 * inner),
    }  # fmt: skip
    for layer in range(4):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return {f"image_proj.{name}": torch.randn(shape) for name, shape in shapes.items()}
