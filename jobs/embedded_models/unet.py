"""What the two diffusion stages share: the UNet, its moving average, and its batches.

In: latents, captions and labels on the training device. Out: batches ready for a loss.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from jobs.embedded_models.render import FIRST_DIGIT_LABEL, load_rendered
from jobs.embedded_models.settings import Settings, autocast
from jobs.embedded_models.tokenizer import load_tokenizer, token_ids

AVERAGE_EVERY = 4


def build_unet() -> Any:
    """13.1 M parameters, over latents of 16x16x4."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=256,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def load_unet(settings: Settings, weights: Path | None = None) -> Any:
    """A UNet on the training device, with the weights of a safetensors file if given."""
    from safetensors.torch import load_file

    unet = build_unet()
    if weights is not None:
        unet.load_state_dict(load_file(weights))
    return unet.to(settings.device, memory_format=torch.channels_last)


def save_unet(weights: dict[str, torch.Tensor], path: Path) -> Path:
    """Writes a UNet's weights in float32."""
    from safetensors.torch import save_file

    save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, path)
    return path


class MovingAverage:
    """An exponential moving average of a model's weights, updated every fourth step.

    The decay grows from 0.1 towards `decay`, so that the random start is soon forgotten.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.decay = decay
        self.weights = {
            name: tensor.detach().clone().float() for name, tensor in model.state_dict().items()
        }

    def update(self, model: Any, step: int) -> bool:
        """Moves towards the model's weights if it is time to; whether it was."""
        if step % AVERAGE_EVERY:
            return False
        decay = min(self.decay, (1 + step) / (10 + step)) ** AVERAGE_EVERY
        current = model.state_dict()
        names = [name for name in self.weights if self.weights[name].is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[name] for name in names],
            [current[name].float() for name in names],
            1 - decay,
        )
        return True


class Batch(NamedTuple):
    """Scaled latents `(n, 4, 16, 16)`, fresh noise of that shape, and token ids `(n, 64)`."""

    clean: torch.Tensor
    noise: torch.Tensor
    ids: torch.Tensor


class Latents:
    """Draws batches of latents with captions, digits and photographs in given proportions."""

    def __init__(self, settings: Settings, *, digit_weight: float, photograph_weight: float):
        from safetensors.torch import load_file

        config = settings.output_of("vae", "vae/config.json").read_text(encoding="utf-8")
        self.scale = json.loads(config)["scaling_factor"]
        path = settings.output_of("vae", "latents.safetensors")
        self.device = settings.device
        self.latents = load_file(path, device=self.device)["latents"]
        self.ids = load_rendered(settings, "captions")
        is_digit = load_rendered(settings, "labels") >= FIRST_DIGIT_LABEL
        self.cumulative = torch.where(is_digit, digit_weight, photograph_weight).float().cumsum(0)

    def batch(self, size: int) -> Batch:
        """`size` pictures, each with one of its two captions."""
        point = torch.rand(size, device=self.device) * self.cumulative[-1]
        rows = torch.searchsorted(self.cumulative, point).clamp(max=len(self.latents) - 1)
        clean = self.latents[rows].float() * self.scale
        which = torch.randint(0, 2, (size,), device=self.device)
        return Batch(clean, torch.randn_like(clean), self.ids[rows, which].long())


class Prompts:
    """The frozen text encoder, and the embedding of the empty prompt."""

    def __init__(self, settings: Settings) -> None:
        from transformers import CLIPTextModel

        self.device = settings.device
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        folder = settings.output_of("text", "text_encoder")
        encoder: Any = CLIPTextModel.from_pretrained(folder, dtype=dtype)
        self.encoder = encoder.to(self.device).eval().requires_grad_(False)
        empty = token_ids(load_tokenizer(settings), [""])
        self.empty_ids = torch.from_numpy(empty).long().to(self.device)

    @torch.no_grad()
    def embed(self, ids: torch.Tensor, *, drop: float = 0.0) -> torch.Tensor:
        """`(n, 64)` ids to `(n, 64, 256)`; a share of `drop` as the empty prompt."""
        if drop:
            dropped = torch.rand(len(ids), 1, device=self.device) < drop
            ids = torch.where(dropped, self.empty_ids, ids)
        with autocast(self.device):
            return self.encoder(ids).last_hidden_state

    def empty(self, count: int) -> torch.Tensor:
        """The empty prompt's embedding `count` times."""
        return self.embed(self.empty_ids).expand(count, -1, -1).contiguous()


Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def predictor(unet: Any, settings: Settings) -> Predict:
    """A function of noisy latents, time steps and prompts to v in float32, compiled on a GPU."""
    forward = torch.compile(unet) if settings.compiles else unet

    def predict(noisy: torch.Tensor, steps: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with autocast(settings.device):
            return forward(noisy, steps, prompts).sample.float()

    return predict
