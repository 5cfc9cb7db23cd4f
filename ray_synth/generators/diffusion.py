"""One off-the-shelf diffusers pipeline: prompts and seeds in, RGB images out. No Ray here.

An image's noise comes from its own seed alone, and every batch has the same shape, the last one padded:
so an image is the same to the bit whatever batch it was in.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_synth.config import GenerationConfig
from ray_synth.device import pick_device, pick_dtype
from ray_synth.errors import UserError
from ray_synth.generators.compilation import compile_parts, first_on_this_node
from ray_synth.generators.families import guidance_argument, read_facts
from ray_synth.generators.loading import (
    check_code,
    find_scheduler,
    load_pipeline,
    read_index,
    resolve_model,
)
from ray_synth.generators.protocol import Failure, Row
from ray_synth.generators.settings import (
    check_size,
    family_of,
    filled,
    fingerprint,
    prompt_tokens,
)

if TYPE_CHECKING:
    from PIL import Image

    from ray_synth.config import PracticeGuidanceConfig
    from ray_synth.generators.ip_adapter import ImageGuide
    from ray_synth.generators.learner import SteeringLearner
    from ray_synth.generators.learner_guidance import LearnerGuidance
    from ray_synth.generators.prompt_encoder import PromptEncoder

log = logging.getLogger("ray_synth")
# Eight take as long as two alone (embedded model on a CPU: 15 ms, and 7 ms for one).
PROMPTS_AT_ONCE = 8
WARM_UP_STEPS = 2  # the first and a later one: all shapes that a denoiser is given


class DiffusionGenerator:
    """A loaded diffusers pipeline: text-to-image; with `reference` image-to-image, or, where an
    IP-Adapter is named, text-to-image that looks at the reference.

    Args:
        config: the generation section, with a batch size that is a number. What it leaves open of
            steps, guidance and size is the family's. `compile` that is "auto" is for GPUs (the caller
            knows how many images there are: `wants_compile`).
        channels_last, cache_prompts: parts of the speed path, off for benchmarks alone.

    Attributes:
        family: what the model needs.
        alone: whether each image has a call of its own, as its text's length decides the shapes.
        batch_size: 1 for such; halved where memory is short.
        compiled: whether it runs compiled.
        provenance: what made the images, for their rows.

    Raises:
        UserError: the model is unknown, cannot be loaded, or cannot do what is asked.
    """

    def __init__(
        self, config: GenerationConfig, *, channels_last: bool = True, cache_prompts: bool = True
    ) -> None:
        import torch

        assert isinstance(config.batch_size, int), "batch_size 'auto' is resolved by the stream"
        self.family = family_of(config)
        self.config = filled(config)
        self.device = pick_device(config.device)
        if not self.device.startswith("cuda"):
            torch.set_num_threads(config.num_threads or os.cpu_count() or 1)
        self.dtype = pick_dtype(config.dtype, self.device, overflows=not self.family.float16)
        self.pipeline = load_pipeline(config, self.dtype)
        if config.adapters:
            from ray_synth.generators.adapters import wear

            wear(self.pipeline, config, self.dtype)
        self._guide: ImageGuide | None = None
        if config.ip_adapter is not None:
            from ray_synth.generators.ip_adapter import ImageGuide

            self._guide = ImageGuide(self.pipeline, config)
        elif config.reference is not None:
            from ray_synth.generators.image_to_image import image_to_image

            self.pipeline = image_to_image(self.pipeline)
        self._place(channels_last)
        self._call = inspect.signature(type(self.pipeline).__call__).parameters
        self._encoder = self._prompt_encoder()
        self._cache_prompts = cache_prompts
        # A large model fills a GPU with one image.
        self.alone = self.family.alone or self._encoder.varies
        self.batch_size = 1 if self.alone else config.batch_size
        self.compiled = False
        self._learner_guidance: LearnerGuidance | None = None
        if config.compile is True or (config.compile == "auto" and self.device.startswith("cuda")):
            self._compile()

    def _prompt_encoder(self) -> PromptEncoder:
        from ray_synth.generators.prompt_encoder import PromptEncoder

        return PromptEncoder(
            self.pipeline,
            chunk=PROMPTS_AT_ONCE,
            context=self.family.context,
            guided_above=self.family.guided_above,
        )

    @property
    def provenance(self) -> dict[str, Any]:
        import torch

        config = self.config
        on_gpu = self.device.startswith("cuda")
        return {
            "pipeline": type(self.pipeline).__name__,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
            "strength": config.reference.strength if config.reference and not self._guide else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "compile": self.compiled,
            "device": torch.cuda.get_device_name() if on_gpu else self.device,
            "num_threads": None if on_gpu else torch.get_num_threads(),
            "torch": torch.__version__,
            **({"adapters": self._origin} if config.adapters else {}),
        }

    @cached_property
    def _origin(self) -> list[dict[str, Any]]:
        from ray_synth.generators.adapter_files import origin

        return origin(self.config.adapters)

    def guide(self, learner: SteeringLearner | None, config: PracticeGuidanceConfig | None) -> None:
        """Have a learner make all later images harder for itself; with None, no longer."""
        self._learner_guidance = None
        if learner is not None and config is not None:
            from ray_synth.generators.learner_guidance import LearnerGuidance

            self._learner_guidance = LearnerGuidance(self.pipeline, learner, config)

    def generate(self, rows: list[Row]) -> list[Image.Image | Failure]:
        """Images of plan rows; `prompt`, `negative_prompt`, `seed` and `reference_image` are used."""
        import torch

        made: list[Image.Image | Failure] = []
        while rows:
            batch = rows[: self.batch_size]
            try:
                made += self._batch(batch)
                rows = rows[len(batch) :]
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                torch.cuda.empty_cache()
                self.batch_size //= 2
                log.warning("out of GPU memory: batches of %d from here on", self.batch_size)
        return made

    def _batch(self, rows: list[Row]) -> list[Image.Image | Failure]:
        import torch
        from PIL import Image

        padded = rows + [rows[-1]] * (self.batch_size - len(rows))
        guidance = self._learner_guidance
        with guidance.applied() if guidance else nullcontext(), torch.inference_mode():
            output = self.pipeline(**self._arguments(padded))
            pixels = _to_uint8(output[0])[: len(rows)]  # `images`, or in Kandinsky 5 `image`
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(rows)
        return [
            Failure("the pipeline's safety checker flagged it") if flag else Image.fromarray(image)
            for flag, image in zip(flagged[: len(rows)], pixels, strict=True)
        ]

    def _arguments(self, rows: list[Row]) -> dict[str, Any]:
        import torch

        config = self.config
        assert config.guidance_scale is not None
        prompts = [_text(row, "prompt") for row in rows]
        negative = [_text(row, "negative_prompt") for row in rows]
        arguments: dict[str, Any] = {
            "generator": [torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
            "num_inference_steps": config.num_inference_steps,
            "output_type": "pt",
            **self._guidance(config.guidance_scale),
            **self._encoder.arguments(
                prompts, negative, config.guidance_scale, embedded=self._cache_prompts
            ),
        }
        if config.reference is None or self._guide is not None:
            arguments |= {"width": config.width, "height": config.height}
            if self._guide is not None:
                guided = config.guidance_scale > self.family.guided_above
                arguments |= self._guide.arguments(rows, guided=guided)
        else:
            from ray_synth.generators.image_to_image import reference_arguments

            arguments |= reference_arguments(self.pipeline, rows, config)
        return {name: value for name, value in arguments.items() if name in self._call}

    def _guidance(self, scale: float) -> dict[str, float]:
        """The argument that guidance goes by in this pipeline, where it takes any."""
        denoiser = getattr(self.pipeline, "transformer", None)
        carries = guidance_argument(self._call)
        if carries == "true_cfg_scale" and getattr(denoiser, "config", {}).get("guidance_embeds"):
            return {"guidance_scale": scale, carries: 1.0}  # a distilled one has it as an input
        return {carries: scale} if carries else {}

    def _place(self, channels_last: bool) -> None:
        """Onto the device, or left to diffusers where it is spread or offloaded."""
        import torch

        config, pipeline = self.config, self.pipeline
        pipeline.set_progress_bar_config(disable=True)
        if config.offload:
            if not self.device.startswith("cuda"):
                raise UserError("generation.offload moves parts to a GPU in turn: there is none")
            pipeline.enable_model_cpu_offload(device=self.device)
        elif config.num_gpus <= 1:
            pipeline.to(self.device)
        if channels_last:
            for name in ("unet", "vae"):
                part = getattr(pipeline, name, None)
                # Autoencoders made from those of videos (Qwen-Image) have weights of five dimensions.
                if part is not None and all(weights.ndim < 5 for weights in part.parameters()):
                    part.to(memory_format=torch.channels_last)

    def _compile(self) -> None:
        """torch.compile of the denoiser and the decoder, for the one shape that batches have.

        Warmed up here by two steps; where memory is short, with smaller batches, as in `generate`.

        Raises:
            UserError: it fails, and the config insists on it.
        """
        import torch

        undo = compile_parts(self.pipeline, dynamic=self.alone)
        facts = [self.config.model_dump_json(exclude={"pool"}), self.device, torch.__version__]
        try:
            first_on_this_node("|".join(facts), self._warm_up)
            self.compiled = True
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            what = f"torch.compile of {self.config.model!r} failed ({type(error).__name__}: {why})"
            if self.config.compile is True:
                raise UserError(
                    f"{what}; set generation.compile: false, or install a C++ compiler"
                ) from None
            undo()
            log.warning("%s: its images are made without", what)

    def _warm_up(self) -> None:
        """A batch of as few steps as there can be."""
        from ray_synth.data.images import gray_image

        config = self.config
        strength = config.reference.strength if config.reference and not self._guide else 1.0
        blank = {"prompt": "", "negative_prompt": "", "seed": 0, "reference_image": gray_image()}
        self.config = config.model_copy(
            update={"num_inference_steps": math.ceil(WARM_UP_STEPS / strength)}
        )
        try:
            self.generate([blank])
        finally:
            self.config = config

    @staticmethod
    def check(config: GenerationConfig) -> None:
        """Look at the pipeline's index alone, so that what is wrong is known at once.

        Raises:
            UserError: neither a diffusers folder nor a hub id that this machine can reach; a
                checkpoint with code of its own; an adapter that does not fit; an unknown scheduler; a
                size that the model does not make; too small a strength.
        """
        index = read_index(config)
        check_code(config, index)
        if config.adapters:
            from ray_synth.generators.adapters import check_adapters

            check_adapters(config, index)
        if config.scheduler:
            find_scheduler(config.scheduler)
        config = filled(config)
        check_size(config)
        if config.reference and config.ip_adapter is None:
            from ray_synth.generators.image_to_image import reference_steps

            assert config.num_inference_steps is not None
            reference_steps(config.num_inference_steps, config.reference.strength)

    @staticmethod
    def check_guidance(config: GenerationConfig) -> None:
        """Raises UserError where a learner cannot guide this model's sampler."""
        from ray_synth.generators.learner_guidance import check_guidance

        index = read_index(config)
        facts = read_facts(resolve_model(config.model), index, config.revision, config.scheduler)
        check_guidance(config, index, facts.scheduler)

    @staticmethod
    def filled(config: GenerationConfig) -> GenerationConfig:
        """The config with what it leaves open as its model's family has it."""
        return filled(config)

    @staticmethod
    def fingerprint(config: GenerationConfig) -> str:
        """A short hex digest of the weights and of all settings that decide the pixels."""
        return fingerprint(config)

    @staticmethod
    def prompt_tokens(config: GenerationConfig) -> tuple[Callable[[str], int], int]:
        """How the text encoder counts, and its context length."""
        return prompt_tokens(config)


def _to_uint8(images: Any) -> np.ndarray:
    """(n, height, width, 3) uint8 from a pipeline's output: a tensor in 0..1, or PIL images."""
    import torch

    if isinstance(images, torch.Tensor):  # rounded on the device: a quarter of the bytes to copy
        pixels = images.permute(0, 2, 3, 1).float().mul(255).round().clamp(0, 255)
        return pixels.to(torch.uint8).cpu().numpy()
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} is {row[key]!r}, not a text")
    return row[key]
