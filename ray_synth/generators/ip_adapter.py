"""IP-Adapter: a real image of the class guides by what CLIP sees in it, in place of its noised pixels.

In: a text-to-image pipeline of diffusers with a UNet, and plan rows with the encoded bytes of a real
image. Out: the embeddings of those images as arguments of the pipeline's call.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_synth.config import AdapterConfig, GenerationConfig
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError, first_line
from ray_synth.generators.adapter_files import adapter_file, encoder_folder, header
from ray_synth.generators.loading import resolve_model, silent

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 256  # images whose embeddings an actor keeps: 2 KB each, or 0.7 MB where every patch has one
PARTS = ("image_proj", "ip_adapter")


class ImageGuide:
    """The IP-Adapter of a pipeline, which it is loaded into here, and the images that it has seen.

    Each image is encoded alone, so that its embedding is the same whatever the batch.

    Args:
        pipeline: before it is moved, offloaded or compiled.

    Raises:
        UserError: it does not fit the pipeline.
    """

    def __init__(self, pipeline: Any, config: GenerationConfig) -> None:
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        adapter = config.ip_adapter
        assert adapter is not None
        _require_unet(type(pipeline))
        self.pipeline, self.offloaded = pipeline, config.offload
        try:
            with silent():
                encoder = CLIPVisionModelWithProjection.from_pretrained(
                    encoder_folder(adapter), use_safetensors=True, local_files_only=True,
                    dtype=pipeline.unet.dtype,
                )  # fmt: skip
                pipeline.register_modules(image_encoder=encoder)
                pipeline.load_ip_adapter(_weights(adapter_file(adapter)), "", "", None)
        except UserError:
            raise
        except Exception as error:  # of diffusers, transformers, torch or safetensors
            raise UserError(
                f"generation.adapters: {adapter.path} does not fit {config.model!r}: {first_line(error)}"
            ) from None
        pipeline.set_ip_adapter_scale(adapter.weight)
        # diffusers' own gives every prompt of a call all images of the call.
        pipeline.prepare_ip_adapter_image_embeds = _one_for_each
        side: Any = encoder.config.image_size
        self._prepare = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
        layers = pipeline.unet.encoder_hid_proj.image_projection_layers
        self._patches = type(layers[0]).__name__ != "ImageProjection"
        self._kept: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()

    def arguments(self, rows: Sequence[dict[str, Any]], *, guided: bool) -> dict[str, Any]:
        """What a call of the pipeline is given for rows that carry `reference_image`.

        Args:
            guided: the pipeline makes a second pass, which has the embedding of no image.

        Raises:
            UserError: an image cannot be decoded.
        """
        import torch

        found = [self._embedding(row["reference_image"]) for row in rows]
        halves = [torch.stack([one for one, _ in found])]
        if guided:  # the pass without comes first
            halves.insert(0, torch.stack([none for _, none in found]))
        return {"ip_adapter_image_embeds": [torch.cat(halves)]}

    def _embedding(self, data: bytes) -> tuple[Tensor, Tensor]:
        """(1, width) or (1, patches, width) of an encoded image, and of none."""
        key = hashlib.blake2b(data, digest_size=16).digest()
        if key not in self._kept:
            pixels = self._prepare(decode_image(data), return_tensors="pt").pixel_values
            pipeline = self.pipeline
            device = pipeline._execution_device if self.offloaded else pipeline.image_encoder.device
            self._kept[key] = pipeline.encode_image(pixels, device, 1, self._patches)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]


def _one_for_each(
    ip_adapter_image: Any, ip_adapter_image_embeds: list[Tensor], device: Any, *others: Any
) -> list[Tensor]:
    """In place of the pipeline's method of this name: `ImageGuide.arguments` as they are."""
    return [embeddings.to(device) for embeddings in ip_adapter_image_embeds]


def check_ip_adapter(
    config: GenerationConfig, kind: Any, adapter: AdapterConfig, index: dict[str, Any]
) -> None:
    """Look at its shapes, and at those of the model's UNet without its weights.

    Args:
        kind: the class of the pipeline, and its index.

    Raises:
        UserError: a pipeline that takes none; a file or an image encoder that is missing, broken, or
            made for another model.
    """
    from transformers import CLIPVisionConfig

    _require_unet(kind)
    path, folder = adapter_file(adapter), encoder_folder(adapter)
    header(path)
    header(folder / "model.safetensors")
    shapes = _shapes(path)
    reads = _reads(shapes, path)
    width = getattr(CLIPVisionConfig.from_pretrained(folder), reads[0])
    if width != reads[1]:
        raise UserError(
            f"generation.adapters: {adapter.path} reads images as {reads[1]} numbers, and the image "
            f"encoder {folder} has {reads[0]} {width}: name another with image_encoder"
        )
    expected = _cross_attention(config, index)
    given = {name: shape for name, shape in shapes.items() if name.endswith("to_k_ip.weight")}
    if sorted(given.values()) != sorted(expected):
        raise UserError(
            f"generation.adapters: {adapter.path} does not fit {config.model!r}: it has "
            f"{len(given)} layers of {_sizes(list(given.values()))}, and the model {len(expected)} of "
            f"{_sizes(expected)}; it was made for another model"
        )


def _require_unet(kind: Any) -> None:
    takes = "ip_adapter_image_embeds" in inspect.signature(kind.__call__).parameters
    parts = inspect.signature(kind.__init__).parameters
    if not takes or not {"unet", "image_encoder"} <= set(parts):
        raise UserError(
            f"generation.adapters: no IP-Adapter goes into {kind.__name__} here; take a Stable "
            "Diffusion 1, 2 or SDXL model, or leave it out: generation.reference alone guides by "
            "image-to-image"
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _reads(shapes: dict[str, tuple[int, ...]], path: Path) -> tuple[str, int]:
    """What it reads of the image encoder: a setting of that encoder's config, and its value."""
    whole, patches = shapes.get("image_proj.proj.weight"), shapes.get("image_proj.proj_in.weight")
    known = whole or patches
    others = {name for name in shapes if name.partition(".")[0] not in PARTS or "lora" in name}
    if not known or others or not any(name.startswith("ip_adapter.") for name in shapes):
        raise UserError(
            f"generation.adapters: {path} holds no IP-Adapter that is read here: of those for faces, and "
            "of other formats, none is"
        )
    return ("projection_dim" if whole else "hidden_size"), known[1]


def _cross_attention(config: GenerationConfig, index: dict[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of the keys of the UNet's layers that read the prompt."""
    import diffusers
    import torch

    of_unet = getattr(diffusers, str(index["unet"][1]), diffusers.UNet2DConditionModel)
    settings = of_unet.load_config(
        resolve_model(config.model), subfolder="unet", revision=config.revision
    )
    with torch.device("meta"):
        unet = of_unet.from_config(settings)
    return [
        tuple(weights.shape)
        for name, weights in unet.named_parameters()
        if name.endswith("attn2.to_k.weight")
    ]


def _sizes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(" x ".join(map(str, shape)) for shape in sorted(set(shapes))[:4])


def _weights(path: Path) -> dict[str, dict[str, Tensor]]:
    """As diffusers takes them: by part, each by its name below the part's."""
    from safetensors.torch import load_file

    found: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, value in load_file(path).items():
        part, _, rest = name.partition(".")
        found[part][rest] = value
    return found
