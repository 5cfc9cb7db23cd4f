"""Tiny pipelines of the families whose text encoder is a language model, with random weights."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pipelines import TEXT_WEIGHT, WIDTH, vae

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
)
QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>")
VISION_MARKS = ("<|vision_start|>", "<|vision_end|>")
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


def byte_vocabulary(*marks: str) -> dict[str, int]:
    """A token for each byte, and some marks."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: i for i, token in enumerate([*marks, *letters])}


def qwen_tokenizer() -> Any:
    """Qwen's own tokenizer over single bytes."""
    from transformers import Qwen2Tokenizer

    tokenizer: Any = Qwen2Tokenizer(
        vocab=byte_vocabulary(*QWEN_MARKS, *VISION_MARKS), merges=[], model_max_length=4096
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*QWEN_MARKS, *VISION_MARKS]})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer(*words: str) -> Any:
    """Gemma's own tokenizer over single letters, and some words."""
    from transformers import GemmaTokenizer

    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,.:;'\"-<>/()\n"
    marks = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocabulary = {token: i for i, token in enumerate([*marks, *letters])}
    tokenizer: Any = GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=4096)
    tokenizer.add_tokens([*words])
    return tokenizer


def qwen_vision_language() -> Any:
    """Qwen2.5-VL, as Qwen-Image and Kandinsky 5 have it."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]},
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    marks = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    )


def gemma(tokenizer: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
        )
    )


def qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _save(pipeline: Any, folder: Path, *text_weights: str) -> Path:
    """With weights that the text goes through made larger, so that it shows in the pixels."""
    for name, weights in pipeline.transformer.named_parameters():
        if any(part in name for part in text_weights):
            weights.data.mul_(TEXT_WEIGHT)
        if not weights.any():  # gates that begin at zero would let nothing through
            weights.data.normal_(std=0.2)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _flow(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


def qwen_image(folder: Path) -> Path:
    """Qwen-Image: embeddings as long as their prompt, guidance as `true_cfg_scale`."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    pipeline = QwenImagePipeline(
        scheduler=_flow(),
        vae=qwen_vae(),
        text_encoder=qwen_vision_language(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )
    return _save(pipeline, folder, "txt_in.weight", "add_v_proj.weight")


def z_image(folder: Path, *, shift: float = 6.0) -> Path:
    """Z-Image: lists of embeddings, guidance above 0."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
        )
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    pipeline = ZImagePipeline(
        scheduler=_flow(shift=shift),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return _save(pipeline, folder, "cap_embedder.1.weight")


def z_image_turbo(folder: Path) -> Path:
    """Z-Image-Turbo: a smaller shift, and no guidance."""
    return z_image(folder, shift=3.0)


def kandinsky5(folder: Path) -> Path:
    """Kandinsky 5: text without a mask, and CLIP for the pooled text."""
    from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel
    from pipelines import clip_text_encoder, clip_tokenizer
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(8, 4, 4),
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(), qwen_tokenizer(), Qwen2VLVideoProcessor(), chat_template=CHAT
    )
    pipeline = Kandinsky5T2IPipeline(
        transformer=transformer,
        vae=vae(),
        text_encoder=qwen_vision_language(),
        tokenizer=processor,
        text_encoder_2=clip_text_encoder(),
        tokenizer_2=clip_tokenizer(),
        scheduler=_flow(),
    )
    return _save(pipeline, folder, "text_embeddings.in_layer.weight")


def lumina2(folder: Path) -> Path:
    """Lumina Image 2: Gemma, padded to one length."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(512, 64, 64),
        cap_feat_dim=WIDTH,
    )
    tokenizer = gemma_tokenizer()
    pipeline = Lumina2Pipeline(
        transformer=transformer,
        scheduler=_flow(),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=gemma(tokenizer),
        tokenizer=tokenizer,
    )
    return _save(pipeline, folder, "caption_embedder.1.weight")


def sana(folder: Path) -> Path:
    """Sana: Gemma with an instruction of its own before each prompt, an autoencoder of 32 pixels."""
    from diffusers import (
        AutoencoderDC,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    torch.manual_seed(0)
    blocks: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8, 8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8, 8, 8),
        "encoder_layers_per_block": (1,) * 6,
        "decoder_layers_per_block": (1,) * 6,
        "encoder_qkv_multiscales": ((),) * 6,
        "decoder_qkv_multiscales": ((),) * 6,
    }
    call = inspect.signature(SanaPipeline.__call__).parameters
    instruction = " ".join(call["complex_human_instruction"].default)
    tokenizer = gemma_tokenizer(*sorted(set(re.findall(r"[A-Za-z]{3,}", instruction))))
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer),
        vae=AutoencoderDC(latent_channels=4, attention_head_dim=2, **blocks),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=16,  # it makes 512 x 512, then resizes
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _save(pipeline, folder, "attn2.to_v.weight", "caption_projection.linear_1.weight")


def flux2(folder: Path) -> Path:
    """Flux 2: Mistral, of which three layers' outputs are read, padded to one length."""
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    fast = qwen_tokenizer()
    fast.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast.backend_tokenizer, pad_token="<|endoftext|>", model_max_length=4096
    )
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 31,  # of which the 10th, 20th and 30th are read
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 32,
        "patch_size": 16,
    }
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=text,
            vision_config=vision,
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        )
    )
    blocks: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    pipeline = Flux2Pipeline(
        scheduler=_flow(),
        vae=AutoencoderKLFlux2(**blocks),
        text_encoder=encoder,
        tokenizer=PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=CHAT),
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
    )
    return _save(
        pipeline, folder, "context_embedder.weight", "add_v_proj.weight", "to_add_out.weight"
    )


LANGUAGE_FAMILIES: dict[str, Callable[[Path], Path]] = {
    "flux2": flux2,
    "sana": sana,
    "lumina2": lumina2,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "z-image-turbo": z_image_turbo,
    "kandinsky5": kandinsky5,
}
