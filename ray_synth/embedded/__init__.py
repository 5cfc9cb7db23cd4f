"""The embedded models: where their packaged weights lie.

In: nothing. Out: folders that diffusers and open_clip load as they load any local model.
See MODEL_CARD.md for what they are and `jobs.embedded_models` for how they were made.
"""

from importlib.resources import files
from pathlib import Path

from ray_synth.errors import UserError


def _packaged(name: str) -> Path:
    folder = Path(str(files("ray_synth.embedded") / "weights" / name))
    if not folder.is_dir():
        raise UserError(
            f"The embedded {name!r} weights are not at {folder}: install ray-synth from a wheel "
            "or a full checkout, or name another model in the config."
        )
    return folder


def sd_folder() -> Path:
    """Folder of the embedded text-to-image model, a diffusers `StableDiffusionPipeline`.

    Load it with `AutoPipelineForText2Image.from_pretrained(sd_folder())`: 64x64 pixels, 4 steps,
    guidance scale 1.

    Raises:
        UserError: the package was installed without its weights.
    """
    return _packaged("sd")


def clip_folder() -> Path:
    """Folder of the embedded CLIP; open_clip's name for it is `f"local-dir:{clip_folder()}"`.

    Raises:
        UserError: the package was installed without its weights.
    """
    return _packaged("clip")
