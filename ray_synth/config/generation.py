"""The image generator, its pool, the checks of its images, and its tuning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_synth.config.section import (
    Device,
    Dtype,
    Finite,
    Fraction,
    Place,
    Positive,
    Section,
    how,
    result,
)
from ray_synth.errors import UserError

SMALL_SIDE = 128  # pixels: pictures no larger are kept as PNG where the format is "auto"


class PoolConfig(Section):
    """Bounds of the autoscaling pool of generator actors."""

    min_size: Positive = how(1)
    max_size: Positive = how(1)

    @model_validator(mode="after")
    def _ordered(self) -> PoolConfig:
        if self.max_size < self.min_size:
            raise UserError(f"max_size {self.max_size} is below min_size {self.min_size}")
        return self


class ReferenceConfig(Section):
    """Image-to-image generation, guided by real training images of the class."""

    strength: Annotated[float, Field(gt=0, le=1)] = result(
        0.75,
        description="share of the noise schedule that is run: 1 forgets the real image. Of no effect "
        "where an IP-Adapter guides instead",
    )


class AdapterConfig(Section):
    """A LoRA, the words of a textual inversion, or an IP-Adapter, that the image model is given."""

    path: Place = result(description="hub id, safetensors file, or a folder or URI that holds it")
    kind: Literal["lora", "textual_inversion", "ip_adapter"] = result("lora")
    weight_name: Annotated[str, Field(pattern=r"^[\w][\w. /-]*\.safetensors$")] | None = result(
        None,
        description="the file in it; default: pytorch_lora_weights.safetensors, "
        "learned_embeds.safetensors, or models/ip-adapter_sd15.safetensors",
    )
    revision: str | None = result(None)
    weight: Finite = result(
        1.0, description="of a LoRA and an IP-Adapter: its part in the result is multiplied by it"
    )
    image_encoder: str | None = result(
        None,
        description="of an IP-Adapter: the folder in `path` with its CLIP image encoder; default: "
        "image_encoder beside the file",
    )
    token: Annotated[str, Field(pattern=r"^\S+$")] | None = result(
        None, description="of a textual inversion: its word in prompts; default: the file's own"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _of_its_kind(self) -> AdapterConfig:
        if self.weight == 0:
            raise UserError(f"adapter {self.path} with weight 0 changes nothing: leave it out")
        if self.kind != "textual_inversion" and self.token:
            raise UserError(f"adapter {self.path}: token belongs to kind: textual_inversion")
        if self.kind == "textual_inversion" and self.weight != 1:
            raise UserError(f"adapter {self.path}: weight belongs to kind: lora and ip_adapter")
        if self.kind != "ip_adapter" and self.image_encoder:
            raise UserError(f"adapter {self.path}: image_encoder belongs to kind: ip_adapter")
        return self


class QualityConfig(Section):
    """What is looked for in each generated image, and what happens to those that fail."""

    policy: Literal["off", "flag", "reject", "retry"] = result(
        "flag", description="flag: only say so; reject: not trained on; retry: with new seeds"
    )
    clip: bool = result(True, description="CLIP score against the resolved meaning; duplicates")
    clip_quantile: Fraction = result(
        0.01, description="an image fails below this quantile of real images' own CLIP scores"
    )
    label: bool = result(True, description="CLIP must not find another class likelier")
    label_quantile: Fraction = result(
        0.1, description="by as much as it does for this share of the real images"
    )

    @property
    def need_clip(self) -> bool:
        """Whether images are judged by CLIP, against a reference measured on real ones."""
        return self.policy != "off" and (self.clip or self.label)

    @field_validator("policy", mode="before")
    @classmethod
    def _off_is_a_word(cls, policy: Any) -> Any:
        return "off" if policy is False else policy  # YAML reads a bare off as false


class GenerationConfig(Section):
    """The off-the-shelf image generator and the pool that runs it."""

    generator: str = result(
        "diffusers", description="'diffusers', an installed plug-in's name, or module:Class"
    )
    generator_kwargs: dict[str, Any] = result(
        default_factory=dict, description="settings of a plug-in generator"
    )
    model: str = result("embedded", description="'embedded', hub id, or a diffusers folder")
    revision: str | None = result(None)
    variant: str | None = result(None)
    scheduler: str | None = result(
        None, description="a diffusers scheduler class, else the model's"
    )
    dtype: Dtype = result("auto")
    device: Device = how("auto")
    width: Annotated[int, Field(ge=8, multiple_of=8)] | None = result(
        None, description="pixels; default: what the model was trained on"
    )
    height: Annotated[int, Field(ge=8, multiple_of=8)] | None = result(None)
    num_inference_steps: Positive | None = result(None, description="default: the model family's")
    guidance_scale: Annotated[float, Field(ge=0)] | None = result(
        None, description="default: the model family's"
    )
    reference: ReferenceConfig | None = result(None, description="guide by real images")
    adapters: list[AdapterConfig] = result(
        default_factory=list,
        description="LoRA files, textual inversions and an IP-Adapter, by safetensors",
    )
    batch_size: Positive | Literal["auto"] = how(
        16, description="images at a time; 'auto' probes the device's memory"
    )
    image_format: Literal["auto", "png", "webp", "jpeg"] = result(
        "auto", description="how images are kept; auto: png up to 128 px, above that jpeg"
    )
    quality: Annotated[int, Field(ge=1, le=100)] = result(92, description="of webp and jpeg files")
    compile: bool | Literal["auto"] = how(
        "auto", description="torch.compile; auto: on GPUs, where the plan is long enough to pay"
    )
    offload: bool = how(False, description="keep parts that are not at work in CPU memory")
    trust_remote_code: bool = how(False, description="run Python code that a checkpoint brings")
    checks: QualityConfig = result(QualityConfig())
    pool: PoolConfig = how(PoolConfig())
    num_cpus: Annotated[float, Field(gt=0)] = how(1)
    num_gpus: Annotated[float, Field(ge=0)] = how(
        0, description="GPUs per actor: a fraction shares one, 2 or more spread the model"
    )
    num_threads: Positive | None = how(None, description="torch threads per actor; default: cores")

    @model_validator(mode="after")
    def _guided_by_images(self) -> GenerationConfig:
        guides = [item.path for item in self.adapters if item.kind == "ip_adapter"]
        if len(guides) > 1:
            raise UserError(f"generation.adapters has {len(guides)} IP-Adapters: give one of them")
        if guides and self.reference is None:
            raise UserError(
                f"the IP-Adapter {guides[0]} guides by real images: set generation.reference: {{}}"
            )
        return self

    @property
    def ip_adapter(self) -> AdapterConfig | None:
        """What guides by real images in place of image-to-image; None: nothing does."""
        return next((item for item in self.adapters if item.kind == "ip_adapter"), None)

    @property
    def encoding(self) -> dict[str, Any]:
        """`image_format` and `quality` of the files, with "auto" settled: what decides their bytes.

        Training decodes JPEG six times faster than WebP, and a maker encodes it 30 times faster. Small
        pictures take little room in any format, and PNG loses nothing of them.
        """
        chosen: str = self.image_format
        if chosen == "auto":
            side = max(self.width or 0, self.height or 0)
            chosen = "png" if 0 < side <= SMALL_SIDE else "jpeg"
        # PNG has no quality; the number only keeps the digests of runs that were begun with it.
        return {"image_format": chosen, "quality": 95 if chosen == "png" else self.quality}


class TuningConfig(Section):
    """`ray-synth tune`: a LoRA of the image model, tuned on the real training images."""

    steps: Positive = how(500, description="optimizer steps")
    rank: Positive = how(8, description="of the LoRA's matrices")
    learning_rate: Annotated[float, Field(gt=0)] = how(1e-4)
    batch_size: Positive = how(4)
    checkpoint_every: Positive = how(100, description="steps that a kill costs at most")
