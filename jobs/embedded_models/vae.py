"""Stage `vae`: pictures to latents of a quarter the side, and back.

In: the rendered pictures. Out: `work/vae` (a diffusers `AutoencoderKL`, half precision) and
`work/latents.safetensors`, the latents of all pictures.
"""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from jobs.embedded_models.clock import Clock, step_down
from jobs.embedded_models.render import load_rendered
from jobs.embedded_models.settings import Settings, autocast

SCALES = 3  # of the edge loss, each half the one before
KL_WEIGHT = 2e-5
ENCODE_BATCH = 1024


def build_vae() -> Any:
    """1.6 M parameters: 64x64x3 to 16x16x4."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        act_fn="silu",
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    """`(n, height, width, 3) uint8` to `(n, 3, height, width) float` in -1..1."""
    return pictures.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def edge_loss(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean difference of neighbouring pixels' differences, over three scales."""
    loss = made.new_zeros(())
    for _ in range(SCALES):
        for axis in (-1, -2):
            loss = loss + (made.diff(dim=axis) - real.diff(dim=axis)).abs().mean()
        made, real = functional.avg_pool2d(made, 2), functional.avg_pool2d(real, 2)
    return loss


def train_vae(settings: Settings) -> Path:
    """Trains the autoencoder, encodes every picture with it; returns `work/vae`."""
    from safetensors.torch import save_file

    device = settings.device
    pictures = load_rendered(settings, "pictures")
    torch.manual_seed(0)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-3)
    batch, clock = settings.batch(128, 8), Clock("vae", settings)
    for _ in clock.steps():
        clock.set_learning_rate(optimizer, peak=1.5e-3)
        real = as_input(pictures[torch.randint(0, len(pictures), (batch,), device=device)])
        real = real.contiguous(memory_format=torch.channels_last)
        with autocast(device):
            posterior = vae.encode(real).latent_dist
            made = vae.decode(posterior.sample()).sample
        made = made.float()
        absolute, square = (made - real).abs().mean(), ((made - real) ** 2).mean()
        kl = posterior.kl().mean() / 64
        loss = absolute + 2 * square + 0.5 * edge_loss(made, real) + KL_WEIGHT * kl
        step_down(loss, optimizer, parameters)
        clock.log(absolute=absolute, square=square)

    latents = encode_all(vae.eval(), pictures, device)
    # Diffusion expects latents of about unit variance.
    vae.register_to_config(scaling_factor=1 / latents.float().std().item())
    save_file({"latents": latents.cpu().contiguous()}, settings.work / "latents.safetensors")
    folder = settings.work / "vae"
    vae.half().save_pretrained(folder)
    return folder


@torch.no_grad()
def encode_all(vae: Any, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """The means of all pictures' latents: `(n, 4, 16, 16) float16`."""
    parts = []
    with autocast(device):
        for part in pictures.split(ENCODE_BATCH):
            parts.append(vae.encode(as_input(part)).latent_dist.mode().half())
    return torch.cat(parts)
