"""LoRA files, textual inversions and IP-Adapters that a diffusers pipeline is given, before it makes
anything.

In: `generation.adapters`, and a pipeline. Out: the same pipeline with them. What is wrong with one is
found without the model's weights: a LoRA is put on a denoiser that has shapes and no numbers.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_synth.config import AdapterConfig, GenerationConfig
from ray_synth.errors import UserError, first_line
from ray_synth.generators.adapter_files import (
    adapter_file,
    check_header,
    token_names,
    words_of,
    worn_token,
)
from ray_synth.generators.loading import resolve_model, silent

log = logging.getLogger("ray_synth")
DENOISERS = ("unet", "transformer")


def check_adapters(config: GenerationConfig, index: dict[str, Any]) -> None:
    """Look at all of them, by the pipeline's small files alone.

    Args:
        index: of the pipeline.

    Raises:
        UserError: a file that is missing, broken or of another format; a pipeline that takes none; a
            LoRA of another model, or one that changes nothing; a word that is taken.
    """
    if not config.adapters:
        return
    import diffusers

    named = index.get("_class_name")
    kind = getattr(diffusers, named, None) if isinstance(named, str) else None
    if kind is None:  # of a checkpoint's own code: known when it is loaded
        return
    for adapter in config.adapters:
        if adapter.kind == "lora":
            require_peft()
            _check_lora(config, kind, adapter, index)
        elif adapter.kind == "ip_adapter":
            from ray_synth.generators.ip_adapter import check_ip_adapter

            check_ip_adapter(config, kind, adapter, index)
        else:
            _check_words(config, kind, adapter, index)


def require_peft() -> None:
    """Raises UserError where the library that LoRA need is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "generation.adapters: a LoRA needs a library that is not installed: "
            "pip install 'ray-synth[adapters]'"
        )


def _check_lora(
    config: GenerationConfig, kind: Any, adapter: AdapterConfig, index: dict[str, Any]
) -> None:
    import diffusers

    if not hasattr(kind, "load_lora_weights"):
        raise UserError(
            f"generation.adapters: diffusers loads no LoRA into {kind.__name__}; take a model of "
            "Stable Diffusion, SDXL, SD 3, Flux, or another family that has it"
        )
    path = adapter_file(adapter)
    check_header(path)
    part = next(name for name in DENOISERS if (index.get(name) or [None])[0])
    of_part = getattr(diffusers, str(index[part][1]), None)
    if of_part is None:
        return
    import torch

    settings = of_part.load_config(
        resolve_model(config.model), subfolder=part, revision=config.revision
    )
    with torch.device("meta"):
        denoiser = of_part.from_config(settings)
    with _told(adapter, config.model), silent():
        weights, *more = _state(kind, path, denoiser.config if part == "unet" else None)
        if not _has_numbers(weights):
            raise UserError("all of its changes are 0: it changes nothing")
        mine = {name for name in weights if name.startswith(f"{part}.")}
        if mine:
            denoiser.load_lora_adapter(
                dict(weights), prefix=part, adapter_name="looked_at", low_cpu_mem_usage=True,
                network_alphas=more[0] if len(more) == 2 else None, metadata=more[-1],
            )  # fmt: skip
    others = {str(name).partition(".")[0] for name in set(weights) - mine}
    there = [name for name in others if name in kind._lora_loadable_modules and index.get(name)]
    given = {re.split(r"[._]lora", name)[0] for name in mine}
    _require_layers(adapter, config.model, _layers(denoiser), len(given), elsewhere=bool(there))


def _require_layers(
    adapter: AdapterConfig, model: str, found: int, given: int, *, elsewhere: bool
) -> None:
    if not found and not elsewhere:
        raise UserError(
            f"generation.adapters: {adapter.path} changes nothing of {model!r}: none of its layers is "
            "there; it was made for another model"
        )
    if found < given:
        log.warning(
            "%s: %d of its %d layers are not in %s, and change nothing",
            adapter.path, given - found, given, model,
        )  # fmt: skip


def _state(kind: Any, path: Path, unet_config: Any = None) -> Any:
    """(weights in diffusers' names, [network alphas], metadata) of a LoRA file of any tool."""
    more = {"unet_config": unet_config} if unet_config is not None else {}
    return kind.lora_state_dict(
        str(path.parent), weight_name=path.name, use_safetensors=True, local_files_only=True,
        return_lora_metadata=True, **more,
    )  # fmt: skip


def _has_numbers(weights: dict[str, Any]) -> bool:
    """Whether any of the factors that begin at 0 is something else by now."""
    ends = ("lora_B", "lora_up", "lora.up")
    begun = [value for name, value in weights.items() if any(end in name for end in ends)]
    return not begun or any(bool(value.any()) for value in begun)


def _layers(part: Any) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(layer, BaseTunerLayer) for layer in part.modules())


@contextmanager
def _told(adapter: AdapterConfig, model: str) -> Iterator[None]:
    """What libraries say of an adapter that does not fit, as a user's mistake."""
    try:
        yield
    except Exception as error:  # of diffusers, peft, torch or safetensors
        raise UserError(
            f"generation.adapters: {adapter.path} does not fit {model!r}: {first_line(error)}"
        ) from None


def _check_words(
    config: GenerationConfig, kind: Any, adapter: AdapterConfig, index: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from ray_synth.storage.checkpoints import no_code

    if not hasattr(kind, "load_textual_inversion"):
        raise UserError(
            f"generation.adapters: diffusers loads no textual inversion into {kind.__name__}; take a "
            "Stable Diffusion or SDXL model"
        )
    place = {"revision": config.revision, **no_code()}
    model, token = resolve_model(config.model), worn_token(adapter)
    for part, rows in words_of(adapter).items():
        name = f"text_encoder{part}"
        if not (index.get(name) or [None])[0]:
            raise UserError(
                f"generation.adapters: {adapter.path} is for {name}, which {config.model!r} lacks"
            )
        encoder = AutoConfig.from_pretrained(model, subfolder=name, **place)
        if encoder.hidden_size != rows.shape[1]:
            raise UserError(
                f"generation.adapters: {adapter.path} has vectors of {rows.shape[1]} numbers, and "
                f"{name} of {config.model!r} reads {encoder.hidden_size}: it was made for another model"
            )
        tokenizer = AutoTokenizer.from_pretrained(model, subfolder=f"tokenizer{part}", **place)
        if token in tokenizer.get_vocab():
            raise UserError(
                f"generation.adapters: {token!r} is a word of {config.model!r} already: give another "
                "token"
            )


def add_words(tokenizer: Any, part: str, adapters: Sequence[AdapterConfig]) -> dict[str, str]:
    """Give a tokenizer the words of textual inversions.

    Args:
        part: of which text encoder: "" or "_2".

    Returns:
        What each word is replaced with before it is counted: a token for each of its vectors.
    """
    longer = {}
    for adapter in adapters:
        if adapter.kind == "textual_inversion" and part in words_of(adapter):
            names = token_names(adapter)[: len(words_of(adapter)[part])]
            tokenizer.add_tokens(names)
            longer[names[0]] = " ".join(names)
    return longer


def wear(pipeline: Any, config: GenerationConfig, dtype: Any) -> None:
    """Load all of them into a pipeline, before it is moved, offloaded or compiled.

    In float32 and float16 a LoRA is added to the weights, and costs nothing after. bfloat16 keeps
    eight bits of a weight, in which most of a LoRA's change would be lost: there it stays beside them.

    Raises:
        UserError: one does not fit.
    """
    import torch

    loras = [item for item in config.adapters if item.kind == "lora"]
    for item in config.adapters:
        if item.kind == "textual_inversion":
            _load_words(pipeline, item, config.model)
    if not loras:
        return
    require_peft()
    parts = [name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None)]
    for at, item in enumerate(loras):
        path, before = adapter_file(item), sum(_changed(pipeline, parts))
        check_header(path)
        with _told(item, config.model), silent():
            pipeline.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=f"adapter_{at}",
                use_safetensors=True, local_files_only=True,
            )  # fmt: skip
        if sum(_changed(pipeline, parts)) == before:
            _require_layers(item, config.model, 0, 0, elsewhere=False)
    names = [f"adapter_{at}" for at in range(len(loras))]
    pipeline.set_adapters(names, [item.weight for item in loras])
    if dtype == torch.bfloat16:
        for name in parts:
            for of, weights in getattr(pipeline, name).named_parameters():
                if "lora_" in of:
                    weights.data = weights.data.to(dtype)
        return
    pipeline.fuse_lora(components=parts, safe_fusing=True)
    pipeline.unload_lora_weights()


def _changed(pipeline: Any, parts: Sequence[str]) -> Iterator[int]:
    """Of each layer of each part, how many LoRAs it has."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name in parts:
        for layer in getattr(pipeline, name).modules():
            if isinstance(layer, BaseTunerLayer):
                yield len(getattr(layer, "scaling", {}))


def _load_words(pipeline: Any, adapter: AdapterConfig, model: str) -> None:
    token = worn_token(adapter)
    with _told(adapter, model), silent():
        for part, rows in words_of(adapter).items():
            pipeline.load_textual_inversion(
                {token: rows},
                token=token,
                tokenizer=getattr(pipeline, f"tokenizer{part}"),
                text_encoder=getattr(pipeline, f"text_encoder{part}"),
            )
