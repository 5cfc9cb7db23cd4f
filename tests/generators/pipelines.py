"""Tiny pipelines of the common diffusers families, with random weights, made without a network.

Each builder writes a folder that `DiffusionPipeline.from_pretrained` loads; a 64x64 image of two steps
takes a few hundredths of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ray_synth.config import GenerationConfig

WIDTH = 32  # of the text encoders
TEXT_WEIGHTS = (
    "attn2.to_v.",
    "attn2.to_out.0.w",
    "context_embedder.w",
    "add_v_proj.w",
    "to_add_out.w",
)
TEXT_WEIGHT = 12.0
WORDS = ("a", "photo", "of", "the", "crane", "bird", "red", "small", "large", "on", "in", "cat")


def clip_tokenizer() -> Any:
    """CLIP's own tokenizer over single bytes: no merges, 77 places."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    """T5's own tokenizer over a dozen words and single letters."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -2.0) for word in WORDS if len(word) > 1]
    letters = [(letter, -4.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789,."]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=512)


def clip_text_encoder(*, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_text_encoder(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def vae(latent_channels: int = 4, **settings: Any) -> Any:
    """Eight pixels to a latent, as in the real ones; an image's latents are certain, and about 1."""
    from diffusers import AutoencoderKL

    model: Any = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=64,
        scaling_factor=5.0,
        **settings,
    )
    last = model.quant_conv or model.encoder.conv_out
    last.weight.data[latent_channels:] = 0.0
    last.bias.data[latent_channels:] = -20.0  # the log of the variance
    return model


def unet(cross_attention_dim: int = WIDTH, **settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "cross_attention_dim": cross_attention_dim,
            **settings,
        }
    )


def _sd_parts(**unet_settings: Any) -> dict[str, Any]:
    from diffusers import PNDMScheduler

    torch.manual_seed(0)
    return {
        "vae": vae(),
        "text_encoder": clip_text_encoder(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(**unet_settings),
        "scheduler": PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _save(pipeline: Any, folder: Path) -> Path:
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    for name, weights in denoiser.named_parameters():
        # Random weights hardly react to the text: a test could not tell a wrong prompt from a right one.
        if any(part in name for part in TEXT_WEIGHTS):
            weights.data.mul_(TEXT_WEIGHT)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5 and 2: one CLIP encoder, a UNet, PNDM."""
    from diffusers import StableDiffusionPipeline

    return _save(StableDiffusionPipeline(**_sd_parts()), folder)


def lcm(folder: Path) -> Path:
    """A latent consistency model: guidance is an input of the UNet, not a second pass."""
    from diffusers import LCMScheduler, StableDiffusionPipeline

    parts = _sd_parts(time_cond_proj_dim=16)
    parts["scheduler"] = LCMScheduler(beta_schedule="scaled_linear", steps_offset=1)
    return _save(StableDiffusionPipeline(**parts), folder)


def sd15_with_safety_checker(folder: Path, *, flags: bool = False) -> Path:
    """Stable Diffusion with a safety checker that flags every image, or none."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    parts = _sd_parts()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape["num_attention_heads"] = 2
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(
            projection_dim=16,
            text_config=shape,
            vision_config={**shape, "image_size": 32, "patch_size": 16},
        )
    )
    # An image is flagged where its likeness to a concept is over that concept's threshold.
    checker.concept_embeds_weights.data.fill_(-2.0 if flags else 2.0)
    checker.special_care_embeds_weights.data.fill_(2.0)
    size = {"height": 32, "width": 32}
    parts["feature_extractor"] = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    parts["safety_checker"] = checker
    parts["requires_safety_checker"] = True
    return _save(StableDiffusionPipeline(**parts), folder)


def sdxl(folder: Path, *, turbo: bool = False) -> Path:
    """Stable Diffusion XL: two CLIP encoders, pooled text and sizes as further conditions."""
    from diffusers import (
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
    )

    torch.manual_seed(0)
    settings: dict[str, Any] = {"beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    scheduler: Any = EulerDiscreteScheduler(**settings)
    if turbo:
        scheduler = EulerAncestralDiscreteScheduler(**{**settings, "timestep_spacing": "trailing"})
    pipeline = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_text_encoder(),
        text_encoder_2=clip_text_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        ),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
    )
    return _save(pipeline, folder)


def sdxl_turbo(folder: Path) -> Path:
    """SDXL-Turbo: one to four ancestral steps, without guidance."""
    return sdxl(folder, turbo=True)


def sd3(folder: Path) -> Path:
    """Stable Diffusion 3: two CLIP encoders and T5, a transformer, flow matching."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text_encoder(2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    )
    return _save(pipeline, folder)


def flux(folder: Path, *, guidance_embeds: bool = True) -> Path:
    """Flux: CLIP for the pooled text and T5 for the rest; distilled guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text_encoder(WIDTH),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        ),
    )
    return _save(pipeline, folder)


def flux_schnell(folder: Path) -> Path:
    """FLUX.1 [schnell]: few steps, and no input for guidance."""
    return flux(folder, guidance_embeds=False)


def pixart_sigma(folder: Path) -> Path:
    """PixArt-Sigma: T5 with an attention mask, a transformer. Makes 256x256, then resizes."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    pipeline = PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text_encoder(WIDTH),
        vae=vae(),
        transformer=PixArtTransformer2DModel(
            sample_size=32,
            patch_size=2,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            caption_channels=WIDTH,
            cross_attention_dim=16,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return _save(pipeline, folder)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd15": sd15,
    "lcm": lcm,
    "sd15-safety": sd15_with_safety_checker,
    "sdxl": sdxl,
    "sdxl-turbo": sdxl_turbo,
    "sd3": sd3,
    "flux": flux,
    "flux-schnell": flux_schnell,
    "pixart-sigma": pixart_sigma,
}
# What each family is asked for in tests: real checkpoints of these kinds take no guidance.
GUIDANCE = {"sdxl-turbo": 0.0, "flux-schnell": 0.0}


def config_of(model: Path, **settings: Any) -> GenerationConfig:
    """A small, quick run of a model's folder on the CPU, with some settings of a test's own."""
    small = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
    exact = {"dtype": "float32", "device": "cpu", "batch_size": 2, "num_threads": 1}
    return GenerationConfig(**{"model": str(model), **small, **exact, **settings})


def load(name: str, folder: Path) -> Any:
    """A family's pipeline, written to `folder` and read from there in float32."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    path = FAMILIES[name](folder / name)
    pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(path, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
