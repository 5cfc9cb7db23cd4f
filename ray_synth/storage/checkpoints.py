"""What a checkpoint's own configuration may decide: architecture and numbers, by lists of allowed keys.

Config files of a model come from strangers, and libraries pass parts of them on as keyword arguments.
What is not listed here reaches no loader: `trust_remote_code`, paths of other files, attention kernels of
a hub. Code that a checkpoint brings is run only by `generation.trust_remote_code`, a setting of ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_synth.errors import UserError

NUMBER, TEXT, FLAG = (int, float), (str,), (bool,)
# open_clip_config.json; of its parts, what open_clip hands on as keyword arguments
MODEL_CFG = (
    "embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "custom_text",
    "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "output_dict",
)  # fmt: skip
PREPROCESS_CFG = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
HANDED_ON: dict[str, dict[str, tuple[type, ...]]] = {
    "tokenizer_kwargs": {"clean": TEXT, "strip_sep_token": FLAG, "language": TEXT},
    "act_kwargs": {"approximate": TEXT},
    "norm_kwargs": {"eps": NUMBER},
}
# model_index.json: where a part's class may come from, beside the modules of diffusers.pipelines
LIBRARIES = ("diffusers", "transformers")
# config.json of timm: arguments of its models, and what it says of the weights
TIMM_MODEL_ARGS = (
    "act_layer", "attn_drop_rate", "base_width", "cardinality", "channels", "class_token", "depth",
    "depths", "dims", "drop_path_rate", "drop_rate", "dynamic_img_size", "embed_dim", "fc_norm",
    "final_norm", "global_pool", "img_size", "in_chans", "init_values", "layers", "mlp_ratio",
    "no_embed_class", "norm_layer", "num_classes", "num_heads", "output_stride", "patch_size",
    "pool_include_prefix", "pos_embed", "pre_norm", "proj_bias", "qk_norm", "qkv_bias", "reg_tokens",
    "stem_chs", "stem_type", "stem_width", "strict_img_size", "width", "window_size",
)  # fmt: skip
TIMM_PRETRAINED = (
    "architecture", "classifier", "crop_mode", "crop_pct", "custom_load", "description", "first_conv",
    "fixed_input_size", "hf_hub_id", "input_size", "interpolation", "label_descriptions", "label_names",
    "license", "mean", "min_input_size", "notes", "num_classes", "origin_url", "paper_ids", "paper_name",
    "pool_size", "std", "tag", "test_crop_mode", "test_crop_pct", "test_input_size", "url",
)  # fmt: skip
# generation_config.json: where an answer ends, and a penalty that models were tuned with
GENERATION = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "repetition_penalty",
)  # fmt: skip
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "use_kernels")


def no_code() -> dict[str, bool]:
    """Arguments of transformers' `from_pretrained`: code of a checkpoint is refused.

    Where a library between us and transformers leaves the argument out, transformers would ask on the
    terminal whether to run it; after this call it refuses.
    """
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    return {"trust_remote_code": False}


def check_open_clip(folder: str | Path) -> None:
    """Look at the configuration of a CLIP checkpoint.

    Raises:
        UserError: it is no JSON, or holds a key that is not listed; names it. That there is none is left
            to open_clip to say.
    """
    path = Path(folder) / "open_clip_config.json"
    if not path.is_file():
        return
    config = _read(path)
    model = config.get("model_cfg", config)
    _only(path, "model_cfg", model, MODEL_CFG)
    _only(path, "preprocess_cfg", config.get("preprocess_cfg") or {}, PREPROCESS_CFG)
    parts = {name: part for name, part in model.items() if isinstance(part, dict)}
    for name, part in parts.items():
        for key, value in part.items():
            if isinstance(value, dict):
                allowed = HANDED_ON.get(key)
                if allowed is None:
                    raise _refused(path, f"model_cfg.{name}.{key}", HANDED_ON)
                _only(path, f"model_cfg.{name}.{key}", value, allowed)
                _plain(path, f"model_cfg.{name}.{key}", value, allowed)
        _check_towers(path, name, part)


def _check_towers(path: Path, name: str, part: dict[str, Any]) -> None:
    """A tower of timm or transformers is an architecture, never another checkpoint with a config."""
    import timm

    tower, text = part.get("timm_model_name"), part.get("hf_model_name")
    if tower is not None and not (isinstance(tower, str) and timm.is_model(tower)):
        raise UserError(f"{path}: model_cfg.{name}.timm_model_name {tower!r} is no model of timm's")
    if text is not None and not (
        isinstance(text, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text)
    ):
        raise UserError(f"{path}: model_cfg.{name}.hf_model_name {text!r} is not the id of a hub")


def check_timm(name: str) -> None:
    """Look at the configuration of a timm checkpoint, where the name has a prefix that brings one.

    Raises:
        UserError: a key is not listed; names it. What cannot be fetched is left to timm to say.
    """
    source, _, place = name.partition(":")
    if source.replace("_", "-") not in ("hf-hub", "local-dir") or not place:
        return
    if source.startswith("hf"):
        from huggingface_hub import hf_hub_download

        repo, _, revision = place.partition("@")
        try:
            path = Path(hf_hub_download(repo, "config.json", revision=revision or None))
        except Exception:
            return
    else:
        path = Path(place) / "config.json"
        if not path.is_file():
            return
    config = _read(path)
    _only(path, "model_args", config.get("model_args") or {}, TIMM_MODEL_ARGS)
    # older files have its keys at the top
    if isinstance(config.get("pretrained_cfg"), dict):
        _only(path, "pretrained_cfg", config["pretrained_cfg"], TIMM_PRETRAINED)


def check_transformers(source: str, revision: str | None = None) -> None:
    """Look at config.json of a transformers model for kernels, which are code of a hub.

    Raises:
        UserError: an implementation that is not listed; names it. What cannot be read is left to
            transformers to say.
    """
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except Exception:
        return
    check_kernels(config, f"{source}: config.json")


def check_kernels(config: Any, where: str) -> None:
    """Raises UserError where a config, at any depth, asks for an implementation that is not listed."""
    for key, value in _pairs(config):
        names = list(value.values()) if isinstance(value, dict) else [value]
        if key in KERNELS and any(name and name not in ATTENTION for name in names):
            raise UserError(
                f"{where}: {key} {value!r} would run code from elsewhere; "
                f"use one of {', '.join(ATTENTION)}"
            )


def check_pipeline(index: Mapping[str, Any], folder: Path, model: str) -> None:
    """Look at a diffusers pipeline for Python code of its own, and for classes of other libraries.

    Args:
        index: of model_index.json.
        folder: its folder; that of a hub's model need not exist here.

    Raises:
        UserError: it brings code, and names the setting that runs it all the same.
    """
    from diffusers import pipelines

    named = index.get("_class_name")
    found = {str(named[0])} if isinstance(named, (list, tuple)) else set()
    for part, value in index.items():
        if not isinstance(value, (list, tuple)) or not value or part == "_class_name":
            continue
        library = value[0]
        known = library in LIBRARIES or (
            isinstance(library, str) and library.isidentifier() and hasattr(pipelines, library)
        )
        own = isinstance(library, str) and (folder / part / f"{library}.py").exists()
        if isinstance(library, str) and (own or not known):
            found.add(f"{part}/{library}")
    for path in sorted(folder.glob("*/config.json")) if folder.is_dir() else ():
        check_kernels(_read(path), str(path))
    if found:
        raise UserError(
            f"{model!r} brings Python code of its own ({', '.join(sorted(found))}) and cannot be loaded "
            "without running it; read it, and if you trust it set generation.trust_remote_code: true"
        )


def allowed_generation(config: Any) -> Any:
    """Of a model's generation_config.json, a new `GenerationConfig` of the listed keys alone."""
    from transformers import GenerationConfig

    values = {key: getattr(config, key, None) for key in GENERATION}
    return GenerationConfig(**{key: value for key, value in values.items() if value is not None})


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a mapping of settings")
    return found


def _only(path: Path, where: str, given: Any, allowed: Any) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{path}: {where} is not a mapping of settings")
    for key in given:
        if key not in allowed:
            raise _refused(path, f"{where}.{key}", allowed)


def _plain(
    path: Path, where: str, given: dict[str, Any], allowed: dict[str, tuple[type, ...]]
) -> None:
    for key, value in given.items():
        if value is not None and not isinstance(value, allowed[key]):
            raise UserError(f"{path}: {where}.{key} {value!r} is not of the type that it has")


def _refused(path: Path, what: str, allowed: Any) -> UserError:
    return UserError(
        f"{path}: {what} is none of the settings that a checkpoint may decide "
        f"({', '.join(allowed)}): take it out of the file, if you trust it without"
    )


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested mappings and lists."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
