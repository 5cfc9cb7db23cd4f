"""The losses by which a diffusers model learns images: of UNets, and of transformers that match flows.

In: a pipeline and the prompt of each class. Out: a function of images, their classes and a random
generator, that gives the loss to go down on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray_synth.config import GenerationConfig
from ray_synth.generators.loading import silent
from ray_synth.generators.prompt_encoder import PromptEncoder
from ray_synth.generators.settings import family_of, image_size

Captions = Sequence[str]
Loss = Callable[..., Any]


def noise_loss(
    pipeline: Any, config: GenerationConfig, captions: Captions, device: str
) -> Callable[..., Any]:
    """Of a UNet: how far its guess of the noise (or velocity, or image) is off."""
    import torch
    from diffusers import DDPMScheduler

    with silent():
        scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    kind = scheduler.config.prediction_type
    encode, caption = _encoders(pipeline, config, captions, device)

    def loss(pixels: Any, classes: list[int], generator: Any) -> Any:
        latents = encode(pixels, generator)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        most = scheduler.config.num_train_timesteps
        times = torch.randint(0, most, (len(latents),), generator=generator).to(device)
        noisy = scheduler.add_noise(latents, noise, times)
        wanted = {"epsilon": noise, "sample": latents}.get(kind)
        if wanted is None:
            wanted = scheduler.get_velocity(latents, noise, times)
        text = caption(classes)
        more = {}
        if "pooled_prompt_embeds" in text:
            width, height = image_size(config)
            sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(classes))
            pooled = text["pooled_prompt_embeds"]
            more = {"text_embeds": pooled, "time_ids": sizes.to(device, pooled.dtype)}
        with _autocast(pipeline, device):
            guess = pipeline.unet(
                noisy, times, text["prompt_embeds"], added_cond_kwargs=more
            ).sample
        return torch.nn.functional.mse_loss(guess.float(), wanted.float())

    return loss


def flow_loss(
    pipeline: Any, config: GenerationConfig, captions: Captions, device: str
) -> Callable[..., Any]:
    """Of a transformer that goes straight from noise to image (SD 3): how far its direction is off."""
    import torch

    encode, caption = _encoders(pipeline, config, captions, device)

    def loss(pixels: Any, classes: list[int], generator: Any) -> Any:
        latents = encode(pixels, generator)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        # Times in the middle come more often (Stable Diffusion 3's paper, section 3.1).
        share = torch.randn(len(latents), generator=generator).sigmoid().to(device)
        at = share.view(-1, 1, 1, 1)
        noisy, text = (1 - at) * latents + at * noise, caption(classes)
        most = pipeline.scheduler.config.num_train_timesteps
        with _autocast(pipeline, device):
            guess = pipeline.transformer(
                hidden_states=noisy.to(pipeline.transformer.dtype),
                timestep=share * most,
                encoder_hidden_states=text["prompt_embeds"],
                pooled_projections=text["pooled_prompt_embeds"],
            ).sample
        return torch.nn.functional.mse_loss(guess.float(), (noise - latents).float())

    return loss


def _autocast(pipeline: Any, device: str) -> Any:
    import torch

    half = pipeline.vae.dtype is torch.bfloat16
    return torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=half)


def _encoders(
    pipeline: Any, config: GenerationConfig, captions: Captions, device: str
) -> tuple[Callable[..., Any], Callable[[list[int]], dict[str, Any]]]:
    """What makes latents of (n, 3, height, width) float32 pixels in -1..1, and embeddings of classes."""
    import torch

    vae, family = pipeline.vae, family_of(config)
    encoder = PromptEncoder(pipeline, capacity=max(1, len(captions)), context=family.context)

    def encode(pixels: Any, generator: Any) -> Any:
        with torch.no_grad():
            found = vae.encode(pixels.to(device, vae.dtype)).latent_dist.sample(generator)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (found - shift) * vae.config.scaling_factor

    def caption(classes: list[int]) -> dict[str, Any]:
        prompts = [captions[label] for label in classes]
        return encoder.arguments(prompts, [""] * len(prompts), 0.0)

    return encode, caption
