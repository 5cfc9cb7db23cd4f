"""One off-the-shelf diffusers pipeline: prompts and seeds in, RGB images out. No Ray here.

An image's noise comes from its own seed alone, and every batch has the same shape, the last one padded:
so an image is the same to the bit whatever batch it was in.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_synth.config import GenerationConfig
from ray_synth.device import pick_device, pick_dtype
from ray_synth.errors import UserError, did_you_mean, first_line
from ray_synth.generators.protocol import Failure, Row, digest_settings
from ray_synth.storage.hub import Repo, hub_problem, is_hub_id

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("ray_synth")
# Eight take as long as two alone (embedded model on a CPU: 15 ms, and 7 ms for one).
PROMPTS_AT_ONCE = 8
# A compiled pipeline costs one to two minutes at each actor's start, and saves a third of the time
# after it (docs/generation.md): below this many images a GPU actor it does not pay.
COMPILE_PAYS = 2_000
DENOISERS = ("unet", "transformer")


def resolve_model(model: str) -> str:
    """A model name from the config as diffusers takes it: a folder or a hub id.

    Raises:
        UserError: it looks like a folder but does not exist, or holds no diffusers pipeline.
    """
    if model == "embedded":
        from ray_synth.embedded import sd_folder

        return str(sd_folder())
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{model} is not a diffusers pipeline: it has no model_index.json")
        return str(folder)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"unknown generator {model!r}: no such folder, and a hub id looks like owner/name; "
            "generation.model takes 'embedded', a diffusers folder, or a hub id"
        )
    return model


class DiffusionGenerator:
    """A loaded diffusers pipeline, text-to-image or (with `reference`) image-to-image.

    Args:
        config: the generation section, with a batch size that is a number; `compile` that is "auto"
            is off (the caller knows how many images there are: `wants_compile`).
        channels_last, cache_prompts: parts of the speed path, off for benchmarks alone.

    Attributes:
        provenance: what made the images, for their rows.

    Raises:
        UserError: the model is unknown, cannot be loaded, or cannot do what is asked.
    """

    def __init__(
        self, config: GenerationConfig, *, channels_last: bool = True, cache_prompts: bool = True
    ) -> None:
        import torch

        assert isinstance(config.batch_size, int), "batch_size 'auto' is resolved by the stream"
        self.config = config
        if not torch.cuda.is_available():
            torch.set_num_threads(config.num_threads or os.cpu_count() or 1)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.batch_size = config.batch_size
        self.pipeline = load_pipeline(config, self.dtype)
        if config.reference is not None:
            from ray_synth.generators.image_to_image import image_to_image

            self.pipeline = image_to_image(self.pipeline)
        self._place(channels_last)
        self._encoder = None
        if cache_prompts:
            from ray_synth.generators.prompt_encoder import PromptEncoder

            self._encoder = PromptEncoder(self.pipeline, chunk=PROMPTS_AT_ONCE)
        if config.compile is True:
            self._compile()

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
            "strength": config.reference.strength if config.reference else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "compile": config.compile is True,
            "device": torch.cuda.get_device_name() if on_gpu else self.device,
            "num_threads": None if on_gpu else torch.get_num_threads(),
            "torch": torch.__version__,
        }

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
        with torch.inference_mode():
            output = self.pipeline(**self._arguments(padded))
            pixels = _to_uint8(output.images)[: len(rows)]
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(rows)
        return [
            Failure("the pipeline's safety checker flagged it") if flag else Image.fromarray(image)
            for flag, image in zip(flagged[: len(rows)], pixels, strict=True)
        ]

    def _arguments(self, rows: list[Row]) -> dict[str, Any]:
        import torch

        config = self.config
        prompts = [_text(row, "prompt") for row in rows]
        negative = [_text(row, "negative_prompt") for row in rows]
        arguments: dict[str, Any] = {
            "generator": [torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
            "output_type": "pt",
        }
        if self._encoder is not None:
            arguments |= self._encoder.arguments(prompts, negative, config.guidance_scale)
        else:
            arguments["prompt"] = prompts
            if config.guidance_scale > 1 and any(negative):
                arguments["negative_prompt"] = negative
        if config.reference is None:
            arguments |= {"width": config.width, "height": config.height}
        else:
            from ray_synth.generators.image_to_image import reference_arguments

            arguments |= reference_arguments(self.pipeline, rows, config)
        taken = inspect.signature(type(self.pipeline).__call__).parameters
        if "guidance_scale" not in taken and "true_cfg_scale" in taken:
            arguments["true_cfg_scale"] = config.guidance_scale
        return {name: value for name, value in arguments.items() if name in taken}

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
                if part is not None:
                    part.to(memory_format=torch.channels_last)

    def _compile(self) -> None:
        """torch.compile of the denoiser and the decoder, for the one shape that batches have.

        The first actor of a node compiles; the others wait, and read what it left on disk.
        """
        import torch

        from ray_synth.data.images import encode_array

        with _one_at_a_time("compile"):
            for name in DENOISERS:
                part = getattr(self.pipeline, name, None)
                if part is not None:
                    part.compile(dynamic=False)
            vae = getattr(self.pipeline, "vae", None)
            if vae is not None:
                vae.decode = torch.compile(vae.decode, dynamic=False)
            gray = encode_array(np.full((8, 8, 3), 127, np.uint8))
            blank = {"prompt": "", "negative_prompt": "", "seed": 0, "reference_image": gray}
            try:
                self._batch([blank])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise UserError(
                    f"torch.compile of {self.config.model!r} failed ({type(error).__name__}: "
                    f"{str(error)[:300]}); set generation.compile: false, or install a C++ compiler"
                ) from None

    @staticmethod
    def check(config: GenerationConfig) -> None:
        """Look at the pipeline's index alone, so that what is wrong is known at once.

        Raises:
            UserError: neither a diffusers folder nor a hub id that this machine can reach; a
                checkpoint with code of its own; an unknown scheduler; too small a strength.
        """
        index = _read_index(config)
        code = remote_code(index, Path(resolve_model(config.model)))
        if code and not config.trust_remote_code:
            raise UserError(
                f"{config.model!r} brings Python code of its own ({code}) and cannot be loaded without "
                "running it; read it, and if you trust it set generation.trust_remote_code: true"
            )
        if config.scheduler:
            find_scheduler(config.scheduler)
        if config.reference:
            from ray_synth.generators.image_to_image import reference_steps

            reference_steps(config.num_inference_steps, config.reference.strength)

    @staticmethod
    def fingerprint(config: GenerationConfig) -> str:
        model = resolve_model(config.model)
        settings = config.model_dump(
            include={
                "scheduler", "dtype", "width", "height", "num_inference_steps", "guidance_scale",
                "variant", "image_format", "quality",
            }
        )  # fmt: skip
        if config.reference is not None:
            settings["strength"] = config.reference.strength
        folder = Path(model)
        identity = _folder_digest(folder) if folder.is_dir() else [model, config.revision]
        return digest_settings([identity, settings])

    @staticmethod
    def prompt_tokens(config: GenerationConfig) -> tuple[Callable[[str], int], int]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(config.model), subfolder="tokenizer", revision=config.revision
        )
        limit = min(int(tokenizer.model_max_length), 300)  # T5's own limit is none
        return lambda text: len(tokenizer(text, truncation=False)["input_ids"]), limit


def wants_compile(config: GenerationConfig, *, num_images: int, on_gpu: bool) -> bool:
    """`generation.compile` with "auto" resolved, for an actor that makes `num_images`."""
    if config.compile == "auto":
        return on_gpu and num_images >= COMPILE_PAYS
    return config.compile


def find_scheduler(name: str) -> Any:
    """The diffusers scheduler class. Raises UserError with the nearest names."""
    import diffusers

    found = getattr(diffusers, name, None)
    if isinstance(found, type) and hasattr(found, "set_timesteps"):
        return found
    known = [n for n in dir(diffusers) if n.endswith(("Scheduler", "Inverse")) and n[0].isupper()]
    hint = did_you_mean(name, known, most=3)
    raise UserError(f"diffusers has no scheduler {name!r} (generation.scheduler): {hint}")


def remote_code(index: dict[str, Any], folder: Path) -> str:
    """The names of the Python modules that a pipeline's index asks for; empty where it has none."""
    named = index.get("_class_name")
    modules = {str(named[0])} if isinstance(named, (list, tuple)) else set()
    for part, value in index.items():
        if isinstance(value, (list, tuple)) and value and part != "_class_name":
            modules |= {f"{part}/{value[0]}"} & {
                f"{part}/{file.stem}" for file in (folder / part).glob("*.py")
            }
    return ", ".join(sorted(modules))


def load_pipeline(config: GenerationConfig, dtype: Any) -> Any:
    """The pipeline, in memory, with the scheduler of the config.

    Raises:
        UserError: it cannot be loaded; says why.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    model = resolve_model(config.model)
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "revision": config.revision,
        "variant": config.variant,
    }
    if config.num_gpus > 1:
        arguments["device_map"] = "balanced"
    if config.trust_remote_code:
        arguments["trust_remote_code"] = True
    try:
        try:
            pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(model, **arguments)
        except ValueError:  # a pipeline class that the auto class does not list
            pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **arguments)
    except Exception as error:
        raise UserError(
            f"cannot load the generator {config.model!r} ({_problem(config, error)}); "
            "give a diffusers folder, or a hub id that this machine can reach"
        ) from None
    if config.scheduler:
        scheduler = find_scheduler(config.scheduler)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return pipeline


def _problem(config: GenerationConfig, error: Exception) -> str:
    """Why a model cannot be loaded; of the hub's refusals, what to do."""
    repo = Repo("generation.model", config.model, config.revision, "diffusers")
    refusal = hub_problem(error, repo) if is_hub_id(config.model) else None
    return refusal or first_line(error)


def _read_index(config: GenerationConfig) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    model = resolve_model(config.model)
    try:
        return dict(DiffusionPipeline.load_config(model, revision=config.revision))
    except Exception as error:
        raise UserError(
            f"unknown generator {config.model!r}: {_problem(config, error)}; "
            "generation.model takes 'embedded', a diffusers folder, or a hub id that this machine "
            "can reach"
        ) from None


def _folder_digest(folder: Path) -> str:
    """Configs by content; weights by name, size and header, so that it is quick for any size."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".txt", ".model"):
            with path.open("rb") as file:
                head = file.read(1 << 20)
            digest.update(f"{path.relative_to(folder)}:{path.stat().st_size}".encode() + head)
    return digest.hexdigest()[:16]


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


@contextmanager
def _one_at_a_time(what: str) -> Iterator[None]:
    """One process of this node at a time."""
    import tempfile

    from filelock import FileLock

    user = os.getuid() if hasattr(os, "getuid") else 0
    with FileLock(Path(tempfile.gettempdir()) / f"ray-synth-{user}-{what}.lock"):
        yield
