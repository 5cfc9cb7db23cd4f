"""From the model that a config names to a diffusers pipeline in memory.

In: a folder or a hub id. Out: its index, and the pipeline; or a UserError that says what is wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_synth.config import GenerationConfig
from ray_synth.errors import UserError, did_you_mean, first_line
from ray_synth.storage.checkpoints import check_pipeline, no_code
from ray_synth.storage.hub import Repo, hub_problem, is_hub_id


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


def read_index(config: GenerationConfig) -> dict[str, Any]:
    """A pipeline's model_index.json. Raises UserError where it cannot be read."""
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


def _problem(config: GenerationConfig, error: Exception) -> str:
    """Why a model cannot be loaded; of the hub's refusals, what to do."""
    repo = Repo("generation.model", config.model, config.revision, "diffusers")
    refusal = hub_problem(error, repo) if is_hub_id(config.model) else None
    return refusal or first_line(error)


def find_scheduler(name: str) -> Any:
    """The diffusers scheduler class. Raises UserError with the nearest names."""
    import diffusers

    found = getattr(diffusers, name, None)
    if isinstance(found, type) and hasattr(found, "set_timesteps"):
        return found
    known = [n for n in dir(diffusers) if n.endswith(("Scheduler", "Inverse")) and n[0].isupper()]
    hint = did_you_mean(name, known, most=3)
    raise UserError(f"diffusers has no scheduler {name!r} (generation.scheduler): {hint}")


def check_code(config: GenerationConfig, index: dict[str, Any]) -> None:
    """Raises UserError where a pipeline brings Python code that the config does not trust."""
    if not config.trust_remote_code:
        check_pipeline(index, Path(resolve_model(config.model)), config.model)


def load_pipeline(config: GenerationConfig, dtype: Any) -> Any:
    """The pipeline, in memory, with the scheduler of the config.

    Raises:
        UserError: it cannot be loaded, or brings code that is not trusted; says why.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    check_code(config, read_index(config))
    no_code()  # what diffusers leaves to transformers
    model = resolve_model(config.model)
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "revision": config.revision,
        "variant": config.variant,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.num_gpus > 1:
        arguments["device_map"] = "balanced"
    try:
        with warnings.catch_warnings():  # Kolors, which comes with the import, is of older times
            warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
            auto = diffusers.AutoPipelineForText2Image
        try:
            pipeline = auto.from_pretrained(model, **arguments)
        except ValueError:  # a pipeline class that the auto class does not list
            pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **arguments)
    except Exception as error:
        raise UserError(
            f"cannot load the generator {config.model!r} ({_problem(config, error)}); "
            "give a diffusers folder, or a hub id that this machine can reach"
        ) from None
    check_placement(getattr(pipeline, "hf_device_map", None) or {}, config.model)
    if config.scheduler:
        scheduler = find_scheduler(config.scheduler)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return pipeline


def check_placement(devices: dict[str, Any], model: str) -> None:
    """Raises UserError where diffusers left a part on the CPU, at hours per image.

    `device_map: balanced` gives whole parts to GPUs in turn, and splits none: what does not fit the
    GPU whose turn it is stays on the CPU without a word.

    Args:
        devices: part -> device, as a loaded pipeline has them.
    """
    left = sorted(name for name, device in devices.items() if str(device) == "cpu")
    if left:
        raise UserError(
            f"{', '.join(left)} of {model!r} fits none of the GPUs of generation.num_gpus as a whole, "
            "and diffusers splits no part: it would run on the CPU. Take GPUs with more memory, half "
            "precision, or a smaller model"
        )


@contextmanager
def silent() -> Iterator[None]:
    """Without libraries' words on parts that a LoRA has nothing for, on second ones, and on new rows of
    embeddings; errors are raised."""
    import diffusers
    import transformers

    logs = [library.utils.logging for library in (diffusers, transformers)]
    before = [each.get_verbosity() for each in logs]
    try:
        for each in logs:
            each.set_verbosity(each.CRITICAL)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            yield
    finally:
        for each, level in zip(logs, before, strict=True):
            each.set_verbosity(level)
