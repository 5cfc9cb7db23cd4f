"""BigGAN-deep, a class-conditional GAN: an example of a generator that is not a diffusion model.

In: plan rows, of which the class and the seed count (prompts do not). Out: RGB images. Its weights are
read from a safetensors file alone; `CONVERT` says how to make one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ray_synth.config import GenerationConfig, Section, parse_config
from ray_synth.device import pick_device, pick_dtype
from ray_synth.errors import UserError, first_line, nearest
from ray_synth.generators.protocol import Row, digest_settings, plugin_size

if TYPE_CHECKING:
    from PIL import Image

CONVERT = """\
python -c "import torch; from safetensors.torch import save_file; \
state = torch.load('pytorch_model.bin', map_location='cpu', weights_only=True); \
save_file({k: v.contiguous() for k, v in state.items()}, 'model.safetensors')\""""


class BigGanSettings(Section):
    """`generation.generator_kwargs` of this generator."""

    weights: str
    truncation: float = 0.4
    class_map: dict[str, int | str] = Field(default_factory=dict)


class BigGanGenerator:
    """The generator of `pytorch-pretrained-biggan`, with one noise vector per row.

    Args:
        config: the generation section; of `generator_kwargs` it takes `weights` (a folder with
            config.json and one .safetensors file, or that file), `truncation` (above 0, at most 1:
            less is more typical and less varied), and `class_map` (class name -> ImageNet index, WordNet
            id, or name). `dtype: auto` is float32. Images are resized to `width` x `height`.

    Attributes:
        provenance: what made the images, for their rows.

    Raises:
        UserError: a setting is wrong, the library is missing, or the weights do not fit.
    """

    def __init__(self, config: GenerationConfig) -> None:
        import torch

        self.check(config)
        self.settings = _settings(config)
        self.size = plugin_size(config)
        self.batch_size = config.batch_size if isinstance(config.batch_size, int) else 16
        self.device = pick_device(config.device)
        if config.num_threads and not self.device.startswith("cuda"):
            torch.set_num_threads(config.num_threads)
        dtype = "float32" if config.dtype == "auto" else config.dtype
        self.dtype = pick_dtype(dtype, self.device)
        self.model = _load(self.settings.weights).to(self.device, self.dtype)
        self.provenance = {
            "library": "pytorch-pretrained-biggan",
            "weights": self.settings.weights,
            "truncation": self.settings.truncation,
            "dtype": dtype,
        }

    def generate(self, rows: list[Row]) -> list[Image.Image]:
        """One RGB image of (width, height) for each row; `class_name`, `meaning`, `seed` are used.

        Raises:
            UserError: a class that ImageNet does not have; names it, and `class_map`.
        """
        classes = [self.class_index(row) for row in rows]
        made: list[Image.Image] = []
        for start in range(0, len(rows), self.batch_size):
            now = slice(start, start + self.batch_size)
            made += self._batch([row["seed"] for row in rows[now]], classes[now])
        return made

    def class_index(self, row: Row) -> int:
        """The class that a row stands for, by `class_map`, its name, or else its meaning."""
        name, meaning = row["class_name"], row.get("meaning") or ""
        classes = self.model.config.num_classes
        if name in self.settings.class_map:
            return _mapped(name, self.settings.class_map[name], classes)
        found = imagenet_indices(name)
        if len(found) != 1:  # none, or as with "crane" two
            by_meaning = imagenet_indices(meaning)
            found = (found & by_meaning or by_meaning) if found else by_meaning
        if len(found) != 1 or classes != 1000:
            raise UserError(
                f"BigGAN draws ImageNet's 1,000 classes, and {name!r} (meaning {meaning!r}) is "
                f"{'several' if imagenet_indices(name) else 'none'} of them: map it in "
                "generation.generator_kwargs.class_map, to an index, a WordNet id or a name"
                f"{_nearest(name)}"
            )
        return next(iter(found))

    def _batch(self, seeds: list[int], classes: list[int]) -> Iterator[Image.Image]:
        """Padded to the batch size, as convolutions of other sizes round otherwise."""
        import numpy as np
        import torch
        from PIL import Image
        from pytorch_pretrained_biggan import convert_to_images, truncated_noise_sample

        truncation, config = self.settings.truncation, self.model.config
        missing = self.batch_size - len(seeds)
        noise = [
            # A RandomState takes 32 bits at a time, and seeds have more.
            truncated_noise_sample(1, config.z_dim, truncation, [seed & 0xFFFFFFFF, seed >> 32])
            for seed in seeds + seeds[-1:] * missing
        ]
        labels = torch.tensor(classes + classes[-1:] * missing)
        one_hot = torch.nn.functional.one_hot(labels, config.num_classes)
        with torch.inference_mode():
            pixels = self.model(
                torch.from_numpy(np.concatenate(noise)).to(self.device, self.dtype),
                one_hot.to(self.device, self.dtype),
                truncation,
            )
        for image in convert_to_images(pixels[: len(seeds)].float().cpu()):
            same = image.size == self.size
            yield image if same else image.resize(self.size, Image.Resampling.LANCZOS)

    @staticmethod
    def check(config: GenerationConfig) -> None:
        """Raises UserError for what can be known to be wrong without loading the weights."""
        settings = _settings(config)
        if not 0 < settings.truncation <= 1:
            raise UserError(
                f"generation.generator_kwargs.truncation {settings.truncation}: it must be above 0 "
                "and at most 1"
            )
        if config.reference is not None:
            raise UserError("BigGAN takes no real images: leave generation.reference out")
        classes = _read_config(settings.weights).num_classes
        for name, value in settings.class_map.items():
            _mapped(name, value, classes)

    @staticmethod
    def fingerprint(config: GenerationConfig) -> str:
        """A short hex digest of all that decides the pixels besides a row: the weights by content."""
        settings = _settings(config)
        digests = []
        for path in _files(settings.weights):
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        others = config.model_dump(include={"dtype"}) | config.encoding
        others["width"], others["height"] = plugin_size(config)
        kept = settings.model_dump(exclude={"weights"})
        return digest_settings(["biggan", digests, kept, others])


def imagenet_indices(name: str) -> set[int]:
    """The ImageNet-1k classes that go by a name, a synonym or a WordNet id; case does not matter."""
    return _names().get(_plain(name), set())


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


@cache
def _names() -> dict[str, set[int]]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names: dict[str, set[int]] = {}
    for index, label in enumerate(info.label_names()):
        lemmas = info.label_name_to_description(label)
        for name in (label, lemmas, *lemmas.split(",")):
            names.setdefault(_plain(name), set()).add(index)
    return names


def _nearest(name: str) -> str:
    near = nearest(_plain(name), _names(), cutoff=0.6, most=3)
    return f" (such as {', '.join(map(repr, near))})" if near else ""


def _mapped(name: str, value: int | str, classes: int) -> int:
    """The index that `class_map` gives. Raises UserError."""
    found = {value} if isinstance(value, int) else imagenet_indices(value)
    if len(found) != 1 or not 0 <= (index := next(iter(found))) < classes:
        raise UserError(
            f"generation.generator_kwargs.class_map: {name!r} is mapped to {value!r}, which is not "
            f"one of the {classes:,} classes{_nearest(str(value))}"
        )
    return index


def _settings(config: GenerationConfig) -> BigGanSettings:
    return parse_config(
        dict(config.generator_kwargs), origin="generation.generator_kwargs", model=BigGanSettings
    )


def _files(weights: str) -> tuple[Path, Path]:
    """The safetensors file and its config.json. Raises UserError with the fix."""
    path = Path(weights).expanduser()
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.glob("*.safetensors")) if path.is_dir() else [path]
    files = [file for file in found if file.is_file() and file.suffix == ".safetensors"]
    if len(files) != 1 or not (folder / "config.json").is_file():
        raise UserError(
            f"generation.generator_kwargs.weights {weights!r}: expected one .safetensors file with "
            f"BigGAN's config.json beside it. A pytorch_model.bin is converted once, by: {CONVERT}"
        )
    return files[0], folder / "config.json"


def _read_config(weights: str) -> Any:
    try:
        from pytorch_pretrained_biggan import BigGANConfig
    except ImportError as error:
        raise UserError(
            f"BigGAN needs a library ({error}): pip install pytorch-pretrained-biggan"
        ) from None
    file = _files(weights)[1]
    try:
        return BigGANConfig.from_json_file(str(file))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not BigGAN's: {first_line(error)}") from None


def _load(weights: str) -> Any:
    from pytorch_pretrained_biggan import BigGAN
    from safetensors.torch import load_file

    file, _ = _files(weights)
    model = BigGAN(_read_config(weights))
    try:
        missing = model.load_state_dict(load_file(file), strict=False).missing_keys
    except Exception as error:
        raise UserError(f"{file} is not BigGAN's: {str(error)[:300]}") from None
    if missing:
        raise UserError(f"{file} lacks {len(missing)} weights, such as {missing[0]}")
    return model.eval()
