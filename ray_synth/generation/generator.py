"""One off-the-shelf diffusers pipeline: prompts and seeds in, encoded images out. No Ray here.

An image's noise comes from its own seed alone, so a row can be made again whatever batch it was in.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_synth.config import GenerationConfig
from ray_synth.data.images import encode_image
from ray_synth.device import pick_device, pick_dtype


def resolve_model(model: str) -> str:
    """A model name from the config as diffusers wants it: a folder or a hub id.

    Raises:
        ValueError: it looks like a folder but is none, or holds no diffusers pipeline.
    """
    if model == "embedded":
        from ray_synth.mini import sd_folder

        return str(sd_folder())
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{model} is no diffusers pipeline: it has no model_index.json")
        return str(folder)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"unknown generator {model!r}: no such folder, and a hub id looks like owner/name; "
            "generation.model takes 'embedded', a diffusers folder, or a hub id"
        )
    return model


def check_model(config: GenerationConfig) -> None:
    """Ask for the pipeline's index alone, so that an unknown model is known at once.

    Raises:
        ValueError: neither a diffusers folder nor a hub id that this machine can reach.
    """
    model = resolve_model(config.model)
    if Path(model).is_dir():
        return
    from diffusers import DiffusionPipeline

    try:
        DiffusionPipeline.load_config(model, revision=config.revision)
    except Exception as error:
        raise ValueError(
            f"unknown generator {config.model!r}: no folder of this name, and the hub gave "
            f"{type(error).__name__}; generation.model takes 'embedded', a diffusers folder, or a "
            "hub id that this machine can reach"
        ) from None


def prompt_tokens(config: GenerationConfig) -> tuple[Callable[[str], int], int]:
    """How the pipeline's text encoder counts: a function prompt -> tokens, and its context length.

    Start and end tokens are counted, as they take up places.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        resolve_model(config.model), subfolder="tokenizer", revision=config.revision
    )
    limit = min(int(tokenizer.model_max_length), 512)
    return lambda text: len(tokenizer(text, truncation=False)["input_ids"]), limit


def fingerprint(config: GenerationConfig) -> str:
    """A short hex digest of all that decides an image's pixels besides its prompt and seed."""
    model = resolve_model(config.model)
    settings = config.model_dump(
        include={
            "scheduler",
            "dtype",
            "width",
            "height",
            "num_inference_steps",
            "guidance_scale",
            "variant",
            "image_format",
            "quality",
        }
    )
    identity = _folder_digest(Path(model)) if Path(model).is_dir() else [model, config.revision]
    text = json.dumps([identity, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _folder_digest(folder: Path) -> str:
    """Configs by content; weights by name, size and header, so that it is quick for any size."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".txt", ".model"):
            with path.open("rb") as file:
                head = file.read(1 << 20)
            digest.update(f"{path.relative_to(folder)}:{path.stat().st_size}".encode() + head)
    return digest.hexdigest()[:16]


class Generator:
    """A loaded text-to-image pipeline.

    Args:
        config: the generation section.

    Raises:
        ValueError: the model is unknown or cannot be loaded as a text-to-image pipeline.
    """

    def __init__(self, config: GenerationConfig) -> None:
        import torch

        self.config = config
        if not torch.cuda.is_available():
            torch.set_num_threads(config.num_threads or os.cpu_count() or 1)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.pipeline = _load_pipeline(config, self.dtype).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        if config.channels_last:
            for name in ("unet", "vae"):
                part = getattr(self.pipeline, name, None)
                if part is not None:
                    part.to(memory_format=torch.channels_last)
        self.provenance = json.dumps(
            {
                "model": config.model,
                "revision": config.revision,
                "pipeline": type(self.pipeline).__name__,
                "scheduler": type(self.pipeline.scheduler).__name__,
                "num_inference_steps": config.num_inference_steps,
                "guidance_scale": config.guidance_scale,
                "dtype": str(self.dtype).removeprefix("torch."),
                "fingerprint": fingerprint(config),
            }
        )

    def generate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Make the images of some plan rows.

        Args:
            rows: plan rows; `prompt`, `negative_prompt` and `seed` are used.

        Returns:
            The rows with `image`, `width`, `height`, `clip_score`, `accepted`, `reject_reason`,
            `generator`, `gpu_seconds`. A row that cannot be made has an empty image and says why.
        """
        started = time.perf_counter()
        try:
            results: list[Any] = self._pixels(rows)
        except Exception as error:
            if len(rows) > 1:
                # One bad prompt, or too little memory for the batch: halve until it is found.
                self._free_memory()
                middle = len(rows) // 2
                return self.generate(rows[:middle]) + self.generate(rows[middle:])
            if not isinstance(error, (RuntimeError, ValueError, TypeError, IndexError)):
                raise
            results = [f"{type(error).__name__}: {error}"]
        seconds = (time.perf_counter() - started) / len(rows)
        return [self._row(row, result, seconds) for row, result in zip(rows, results, strict=True)]

    def _pixels(self, rows: list[dict[str, Any]]) -> list[Any]:
        import torch

        arguments: dict[str, Any] = {
            "prompt": [row["prompt"] for row in rows],
            "generator": [torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
            "num_inference_steps": self.config.num_inference_steps,
            "guidance_scale": self.config.guidance_scale,
            "width": self.config.width,
            "height": self.config.height,
        }
        if self.config.guidance_scale > 1 and any(row["negative_prompt"] for row in rows):
            arguments["negative_prompt"] = [row["negative_prompt"] for row in rows]
        with torch.inference_mode():
            output = self.pipeline(**arguments)
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(rows)
        return [
            "the pipeline's safety checker flagged it" if flag else image
            for image, flag in zip(output.images, flagged, strict=True)
        ]

    def _row(self, row: dict[str, Any], result: Any, seconds: float) -> dict[str, Any]:
        failed = isinstance(result, str)
        encoded = b""
        if not failed:
            encoded = encode_image(
                result, image_format=self.config.image_format, quality=self.config.quality
            )
        return {
            **row,
            "image": encoded,
            "width": 0 if failed else result.width,
            "height": 0 if failed else result.height,
            "clip_score": None,
            "accepted": not failed,
            "reject_reason": result if failed else "",
            "generator": self.provenance,
            "gpu_seconds": seconds,
        }

    def _free_memory(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _load_pipeline(config: GenerationConfig, dtype: Any) -> Any:
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    model = resolve_model(config.model)
    arguments = {
        "dtype": dtype,
        "use_safetensors": True,
        "revision": config.revision,
        "variant": config.variant,
    }
    try:
        try:
            pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(model, **arguments)
        except ValueError:  # a pipeline class that the auto class does not list
            pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **arguments)
    except Exception as error:
        raise ValueError(
            f"cannot load the generator {config.model!r} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); "
            "give a diffusers folder, or a hub id that this machine can reach"
        ) from None
    if config.scheduler:
        scheduler = getattr(diffusers, config.scheduler, None)
        if scheduler is None:
            raise ValueError(f"diffusers has no scheduler {config.scheduler!r}")
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return pipeline
