"""The embedded CLIP's architecture, and its text tower as transformers knows it.

In: nothing, or an open_clip model. Out: a model with random weights, or the same text tower.
"""

from typing import Any

import torch

from jobs.embedded_models.tokenizer import BEGIN_ID, CONTEXT, END_ID, PAD_ID, VOCABULARY

WIDTH, HEADS, LAYERS, EMBEDDING = 256, 4, 4, 384
OPEN_CLIP_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": EMBEDDING,
        "vision_cfg": {
            "timm_model_name": "convnext_atto",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_drop_path": 0.0,
            "image_size": 64,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
            "hf_tokenizer_name": "local",
            "tokenizer_kwargs": {"clean": "whitespace"},
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
# transformers' names of a block's parts, from open_clip's.
_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_model() -> Any:
    """An open_clip `CLIP` of the embedded architecture, weights random."""
    from open_clip.model import CLIP

    config = OPEN_CLIP_CONFIG["model_cfg"]
    tokenizer_keys = ("hf_tokenizer_name", "tokenizer_kwargs")
    text = {key: value for key, value in config["text_cfg"].items() if key not in tokenizer_keys}
    return CLIP(config["embed_dim"], config["vision_cfg"], text, output_dict=False)


def is_visual(name: str) -> bool:
    """Whether a parameter belongs to the image tower."""
    return name.startswith("visual")


def text_tower_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's text weights under transformers' names (query, key and value apart)."""
    renamed = {
        "embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        renamed[f"final_layer_norm.{kind}"] = weights[f"ln_final.{kind}"]
        for layer in range(LAYERS):
            old, new = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
            joined = weights[f"{old}attn.in_proj_{kind}"].chunk(3)
            for letter, part in zip("qkv", joined, strict=True):
                renamed[f"{new}self_attn.{letter}_proj.{kind}"] = part
            for open_clip_name, name in _PARTS.items():
                renamed[f"{new}{name}.{kind}"] = weights[f"{old}{open_clip_name}.{kind}"]
    return renamed


def text_encoder(model: Any) -> Any:
    """The text tower of an open_clip model as a `CLIPTextModel`: the same function."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=EMBEDDING,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    encoder = CLIPTextModel(config)
    nested = any(name.startswith("text_model.") for name in encoder.state_dict())
    prefix = "text_model." if nested else ""  # transformers 4 nests the tower, 5 does not
    weights = text_tower_weights(model.state_dict())
    result = encoder.load_state_dict(
        {prefix + name: tensor for name, tensor in weights.items()}, strict=False
    )
    left = [name for name in result.missing_keys if "position_ids" not in name]
    assert not left, left
    assert not result.unexpected_keys, result.unexpected_keys
    return encoder
