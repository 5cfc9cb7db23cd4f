"""The typed configuration of a run: YAML in, a validated and frozen `Config` out.

Every section refuses keys it does not know and names the nearest one that it does. Values given with
`--set a.b=c` override the file.
"""

from __future__ import annotations

import copy
import os
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticUndefined

from ray_synth.errors import UserError, did_you_mean
from ray_synth.storage.secrets import holds_secret, redact, refuse_in_setting
from ray_synth.storage.texts import read_text
from ray_synth.storage.typed_yaml import child, problems, read_typed, typed_value

Kind = Literal["plain", "contextual", "stylized"]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
SMALL_SIDE = 128  # pixels: pictures no larger are kept as PNG where the format is "auto"
IN_DOMAIN = "in_domain"  # what `data.test` is called among the test sets
TAKEN = (IN_DOMAIN, "training", "validation")  # names of sets that no `data.ood` may have
MOST_CANDIDATES = 16  # images that are made of one row, to keep one
RECIPES = Path(__file__).parent / "training" / "recipes"
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
# training.baseline -> the arms that are trained on real images alone.
BASELINES: dict[str, tuple[str, ...]] = {
    "matched": ("real_only",),
    "recipe": ("recipe",),
    "both": ("real_only", "recipe"),
    "none": (),
}


def _in_order(value: int | tuple[int, int]) -> int | tuple[int, int]:
    if isinstance(value, tuple) and value[0] > value[1]:
        raise UserError(f"give [fewest, most], not {list(value)}")
    return value


def _on_this_machine(value: str) -> str:
    if "://" in value:
        raise UserError("answers are kept in an SQLite file, which needs a local disk")
    return value


def at_home(value: Any) -> Any:
    """`~/photos` as the folder that it is; all else as it is."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


# A path or URI; it goes to config.yaml.
Place = Annotated[str, AfterValidator(at_home)]
Replicas = Annotated[
    Positive | tuple[Positive, Positive],
    Field(description="a number, or [fewest, most] to follow the load"),
    AfterValidator(_in_order),
]


def result(default: Any = PydanticUndefined, **more: Any) -> Any:
    """A setting that changes what comes out: another value makes finished work invalid."""
    return Field(default, json_schema_extra={"changes": "result"}, **more)


def how(default: Any = PydanticUndefined, **more: Any) -> Any:
    """A setting of how the work is done (speed, place, what is said of it): it may change at any time.

    Of a section, it holds for all in it.
    """
    return Field(default, json_schema_extra={"changes": "how"}, **more)


# Settings of earlier versions, by dotted name -> what became of each. Runs that have them are still read.
RETIRED: dict[str, str] = {
    "meaning.llm.autoscaling": "Ray Serve's defaults; replicas: [fewest, most] follow the load",
    "meaning.clip.autoscaling": "Ray Serve's defaults; replicas: [fewest, most] follow the load",
    "meaning.llm.max_retries": "a server is asked 5 times again",
    "prompting.retries": "one round of asking again",
    "prompting.max_tokens": "the text encoder's own context length",
    "generation.channels_last": "always on",
    "generation.cache_prompts": "always on",
    "generation.overlap": "always on",
    "generation.reference.images_per_class": "16 real images per class take turns",
    "generation.checks.retries": "two new seeds are tried",
    "generation.checks.pixels": "always looked at; checks.policy: off looks at nothing",
    "generation.checks.duplicate_quantile": "clip_quantile is for both",
    "generation.checks.real_images_per_class": "32 real images per class set the thresholds",
    "training.channels_last": "always on",
    "training.num_threads": "all cores; a study shares them among trainings",
    "training.reservoir_images": "memory_mb bounds what a worker keeps",
    "training.reservoir_mb": "memory_mb bounds what a worker keeps",
    "training.cache_images": "memory_mb bounds what a worker keeps",
    "training.optimizer.clip_mode": "gradients are clipped by their norm",
    "training.optimizer.momentum": "optimizer.kwargs: {momentum: 0.9}",
    "evaluation.restrict_to_test_classes": "always done, where a test set has only some classes",
    "tracking.system_metrics": "always logged",
    "tracking.log_models": "always logged",
    "tracking.registered_model": "MLflow registers any logged model by its page or its API",
    "studies.imbalance": "20",
    "studies.validation": "data.validation; default: 20, at most a fifth of the smallest class",
    "cluster.max_reach.num_cpus": "max_reach: a list of node types, {count, num_cpus, num_gpus} each",
    "cluster.max_reach.num_gpus": "max_reach: a list of node types, {count, num_cpus, num_gpus} each",
    "cluster.max_reach.node_cpus": "max_reach: a list of node types, {count, num_cpus, num_gpus} each",
    "cluster.max_reach.node_gpus": "max_reach: a list of node types, {count, num_cpus, num_gpus} each",
}


# Values of earlier versions, by dotted name -> what each is called now.
RENAMED: dict[str, dict[Any, Any]] = {"training.baseline": {True: "matched", False: "none"}}


def of_today(key: str, value: Any) -> Any:
    """A setting's value in today's words; values of earlier versions are still read."""
    named = RENAMED.get(key, {})
    return named.get(value, value) if isinstance(value, bool) else value


# Settings whose keys are another program's.
FREE = ("generator_kwargs", "model_kwargs", "kwargs", "schedule_kwargs", "llms", "generators")
# Where the secret of a URL belongs, by the setting's name.
INSTEAD_OF_SECRETS = {
    "base_url": "set the variable that api_key_env names (OPENAI_API_KEY)",
    "uri": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; for a "
    "database PGPASSWORD, or its driver's own file",
}


class Section(BaseModel):
    """A group of settings; immutable, and strict about its keys. Each is `result` or `how`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _no_secrets(cls, value: Any, info: ValidationInfo) -> Any:
        """Every text of a config goes to config.yaml, to MLflow and to other machines."""
        name = str(info.field_name)
        refuse_in_setting(value, free=name in FREE, instead=INSTEAD_OF_SECRETS.get(name))
        return value


def _black_then_white(given: tuple[float, float]) -> tuple[float, float]:
    if given[0] == given[1]:
        raise UserError(f"value_range: black and white are both {given[0]:g}")
    return given


class SourceConfig(Section):
    """Where a set of labelled images is read from."""

    format: Literal[
        "digits", "uci_digits", "imagefolder", "parquet", "webdataset", "huggingface"
    ] = result()
    path: Place | None = result(None, description="folder, URI, glob, or Hugging Face dataset id")
    image_list: Place | None = result(
        None,
        description="imagefolder: a text file with a line `path label` for each image, paths below "
        "`path`; default: all images, by their folders",
    )
    split: str | None = result(None, description="split name (huggingface) or train|test (digits)")
    revision: str | None = result(None, description="revision of a Hugging Face dataset")
    image_column: str = result("image")
    label_column: str = result("label")
    images_per_class: Positive | dict[str, Positive] | None = result(
        None, description="take at most this many per class; or a number for each class name"
    )
    class_map: Literal["imagenet_wnids", "imagenet_indices"] | dict[str, str] | None = result(
        None,
        description="label in this source -> class name; labels left out are ignored. Or how "
        "ImageNet's folders are named",
    )
    value_range: Annotated[tuple[Finite, Finite], AfterValidator(_black_then_white)] | None = (
        result(
            None,
            description="[BLACK, WHITE]: values of grey pixels that are shown so, [0, 4095] for 12 bits "
            "kept in 16; default: 16 bits by their type, floats from 0 to 1",
        )
    )
    follow_links: bool = result(
        False, description="imagefolder: read pictures that are links to outside of `path`"
    )

    @model_validator(mode="after")
    def _needs_a_path(self) -> SourceConfig:
        if self.format not in ("digits", "uci_digits") and not self.path:
            raise UserError(f"a source of format {self.format} needs a path")
        if self.image_list and self.format != "imagefolder":
            raise UserError("image_list belongs to format: imagefolder")
        return self


class ClassInfo(Section):
    """What the user knows of a class's name."""

    synonyms: list[str] = result(default_factory=list, description="other names of the class")
    parent: str | None = result(None, description="what it is a kind of: bird")


class DataConfig(Section):
    """The real images: training set, in-domain test, out-of-domain tests."""

    train: SourceConfig = result()
    test: SourceConfig = result()
    ood: dict[str, SourceConfig] = result(default_factory=dict)
    validation: Positive | None = result(
        None, description="training images per class that are held out, to choose settings by"
    )
    class_names: list[str] | str | None = result(
        None,
        description="names, 'imagenet', or a text file with one per line; default: the labels "
        "themselves",
    )
    class_info: dict[str, ClassInfo] | Place | None = result(
        None,
        description="{synonyms: [...], parent: ...} by class name, or a YAML or CSV file of them: "
        "candidates and a context for the meanings",
    )
    max_pixels: Positive = result(50_000_000, description="larger images are set aside")
    max_corrupt: Annotated[float, Field(ge=0, le=1)] = how(
        0.25,
        description="share of a set's images: where more cannot be used, a run does not begin",
    )

    @field_validator("class_names")
    @classmethod
    def _names_at_home(cls, value: Any) -> Any:
        return at_home(value)

    @field_validator("ood")
    @classmethod
    def _names_of_their_own(cls, ood: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        for name in ood:
            if name in TAKEN or not name.strip():
                raise UserError(
                    f"a test set cannot be called {name!r}: "
                    + ("that is the name of another set; " if name.strip() else "")
                    + "give it another name"
                )
        return ood


class LlmConfig(Section):
    """The language model that lists meanings and writes contexts."""

    backend: Literal["transformers", "openai"] = result(
        "transformers", description="openai: any server that speaks OpenAI's HTTP API"
    )
    model: str = result(
        "embedded", description="'embedded', hub id, folder, .gguf file, or a server's model name"
    )
    revision: str | None = result(None)
    style: Literal["auto", "completion", "chat"] = result("auto")
    base_url: str | None = how(None, description="of the server: http://localhost:8000/v1")
    api_key_env: str = how("OPENAI_API_KEY", description="environment variable with its token")
    timeout_s: Annotated[float, Field(gt=0)] = how(60, description="for one question to a server")
    requests_per_minute: Positive | None = how(None, description="sent to a server at most")
    structured: bool = result(False, description="ask a server for JSON by schema")
    cache_dir: Annotated[str, AfterValidator(_on_this_machine)] | None = how(
        None, description="local folder for answers, by model and prompt"
    )
    device: Device = how("auto")
    dtype: Dtype = result("auto")
    max_batch_size: Positive = how(16)
    num_cpus: Annotated[float, Field(gt=0)] = how(1)
    num_gpus: Annotated[float, Field(ge=0)] = how(
        0, description="per replica: a fraction shares one, 2 or more spread the model over them"
    )
    replicas: Replicas = how(1)

    @model_validator(mode="after")
    def _backend_fits(self) -> LlmConfig:
        if self.backend == "openai" and (self.model == "embedded" or self.num_gpus):
            raise UserError(
                "backend openai needs the model's name on the server, and num_gpus 0: the GPU is there"
            )
        if self.backend == "transformers" and (self.base_url or self.structured):
            raise UserError("base_url and structured belong to backend: openai")
        return self


class ClipConfig(Section):
    """The image-text model that scores meanings against images."""

    model: str = result("embedded", description="'embedded', open_clip name, or local-dir:FOLDER")
    pretrained: str | None = result(None)
    device: Device = how("auto")
    dtype: Dtype = result("auto")
    max_batch_size: Positive = how(64)
    temperature: Annotated[float, Field(gt=0)] | None = result(
        None,
        description="standard deviations of similarity above other images that are worth a factor "
        "e of probability; default: 0.7",
    )
    merge_similarity: Fraction | None = result(
        None, description="cosine similarity from which two phrases mean the same"
    )
    cache_images: Annotated[int, Field(ge=0)] = how(
        20_000, description="embeddings of images and texts that a replica keeps"
    )
    num_cpus: Annotated[float, Field(gt=0)] = how(1)
    num_gpus: Annotated[float, Field(ge=0)] = how(0)
    replicas: Replicas = how(1)


class MeaningConfig(Section):
    """Label ambiguity resolution (paper, section 3.1)."""

    enabled: bool = result(True)
    llm: LlmConfig = result(LlmConfig())
    clip: ClipConfig = result(ClipConfig())
    num_meanings: Positive = result(5, description="K: phrases asked from the LLM")
    num_images: Positive = result(16, description="N: real images per class that judge them")
    retries: Annotated[int, Field(ge=0)] = result(3)
    lexicon: Literal["auto", "off", "wordnet"] | str = result(
        "auto",
        description="dictionary senses as candidates: 'auto' is WordNet where it is installed; "
        "'wordnet', a WordNet folder, 'off'",
    )
    context: str | None = result(
        None, max_length=200, description="what the classes are of: 'from a list of farm animals'"
    )


def _even_mix() -> dict[Kind, float]:
    return {"contextual": 0.5, "stylized": 0.5}


class PracticeGuidanceConfig(Section):
    """The learner's entropy steers the sampler of a diffusers pipeline."""

    scale: Annotated[float, Field(gt=0, le=1)] = result(
        0.1,
        description="how far a guided step shifts the predicted clean latents, as a share of their "
        "own size",
    )
    steps: Annotated[float, Field(gt=0, le=1)] = result(
        0.5,
        description="share of the denoising steps that are guided, spread evenly; never the last",
    )


class PracticeSelectConfig(Section):
    """More images are made than are kept: of each prompt the one that is hardest for the learner."""

    factor: Annotated[int, Field(ge=2, le=MOST_CANDIDATES)] = result(
        4, description="images that are made of each row; one is kept"
    )


class PracticeConfig(Section):
    """Rounds: the model in training says what it does not know, and the next images are for that."""

    rounds: Annotated[int, Field(ge=2)] = result(
        description="the plan is made in so many, training goes on between them"
    )
    first: Annotated[float, Field(gt=0, lt=1)] | None = result(
        None, description="share of all images that round 0 has, alike for all; default: 1 / rounds"
    )
    floor: Fraction = result(
        0.3, description="share of each later round that all classes, kinds and styles get alike"
    )
    by_class: bool = result(True, description="classes that the model is unsure of get more images")
    by_kind: bool = result(
        True,
        description="kinds, styles and scenes that it learns from, and the checks accept, get more",
    )
    apart: Literal["negative_prompt", "words"] | None = result(
        "negative_prompt",
        description="where half of a class's rows say which class it is taken for and is not: in the "
        "negative prompt (read with guidance alone), or in words, `not a heron`; null: nowhere",
    )
    contexts: bool = result(
        False, description="the language model writes new scenes for the weakest classes"
    )
    stop: Annotated[float, Field(gt=0)] | None = result(
        None,
        description="no more images once validation shows, two rounds in a row, that a round gains less "
        "than so many points; default: all rounds are made",
    )

    guidance: PracticeGuidanceConfig | None = result(
        None,
        description="the model steers the sampler of later rounds towards what it is unsure of",
    )
    select: PracticeSelectConfig | None = result(
        None, description="of several images of a row in later rounds, the hardest one is kept"
    )

    @model_validator(mode="after")
    def _can_stop(self) -> PracticeConfig:
        if self.stop is not None and self.rounds < 4:
            raise UserError(
                f"practice.stop compares three rounds before it saves one, and rounds is {self.rounds}: "
                "give at least 4, or leave stop out"
            )
        return self


class PromptingConfig(Section):
    """Prompt diversification and the size of the plan (paper, section 3.2)."""

    multiplier: Annotated[float, Field(gt=0)] = result(
        6.0, description="synthetic images = multiplier x real training images, evenly over classes"
    )
    fill_to: Positive | Literal["even"] | None = result(
        None,
        description="real and synthetic images per class together: classes are filled up to this "
        "number; 'even': what multiplier gives is dealt so that they are as even as can be",
    )
    class_multipliers: dict[str, Annotated[float, Field(ge=0)]] = result(
        default_factory=dict, description="synthetic images of a class = this x its real ones"
    )
    mix: dict[Kind, Annotated[float, Field(ge=0)]] = result(default_factory=_even_mix)
    contexts_per_class: Annotated[int, Field(ge=0)] = result(
        16, description="scenes for contextual and stylized prompts; 0: none are written"
    )
    negative_prompt: str = result("")
    styles: str | None = result(None, description="a YAML file of styles; default: the 60 built in")
    acceptance: Place | None = result(
        None,
        description="the directory of an earlier run: contexts and styles of which more of its images "
        "failed the checks are drawn less",
    )
    practice: PracticeConfig | None = result(
        None, description="rounds, steered by the model in training; default: one plan, fixed"
    )

    @field_validator("mix")
    @classmethod
    def _mix_has_weight(cls, mix: dict[str, float]) -> dict[str, float]:
        if sum(mix.values()) <= 0:
            raise UserError("at least one kind of prompt needs a weight above 0")
        return mix

    @model_validator(mode="after")
    def _one_rule(self) -> PromptingConfig:
        if self.fill_to and self.class_multipliers:
            raise UserError("prompting has fill_to and class_multipliers: give one of them")
        own = "fill_to" if self.fill_to else "class_multipliers" if self.class_multipliers else ""
        if self.practice and own:
            raise UserError(
                f"prompting has practice and {own}, and both say how many images each class gets: give "
                "one of them"
            )
        return self


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


class OptimizerConfig(Section):
    """A timm optimizer and its schedule."""

    name: str = result("adamw", description="any of timm's optimizers")
    lr: Annotated[float, Field(gt=0)] = result(1e-3)
    weight_decay: Annotated[float, Field(ge=0)] = result(0.05)
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = result(
        None, description="learning rates fall by this factor per layer, towards the input"
    )
    kwargs: dict[str, Any] = result(default_factory=dict, description="further arguments of timm's")
    schedule: Literal["cosine", "step", "multistep", "poly", "tanh", "constant"] = result("cosine")
    schedule_kwargs: dict[str, Any] = result(
        default_factory=dict, description="decay_milestones, decay_rate, ... (in steps)"
    )
    warmup_fraction: Fraction = result(0.05)
    min_lr_fraction: Fraction = result(0.01)
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = result(1.0)


class TrainingConfig(Section):
    """The classifier and how it is trained (paper, section 3.3)."""

    recipe: str | None = result(
        None, description="a named recipe, or a YAML file: defaults for what is not given here"
    )
    model: str = result("resnet50", description="any timm model name")
    model_kwargs: dict[str, Any] = result(default_factory=dict)
    pretrained: bool = result(False)
    checkpoint: str | None = result(None, description="a local safetensors file to start from")
    image_size: Positive = result(224)
    eval_image_size: Positive | None = result(None, description="default: image_size")
    augment: str | dict[str, Any] = result("imagenet", description="a policy, or its settings")
    mixup: Annotated[float, Field(ge=0)] = result(0.0, description="alpha, within one domain")
    cutmix: Annotated[float, Field(ge=0)] = result(0.0, description="alpha, within one domain")
    repeated_augmentation: Positive = result(
        1, description="draw each real image this many times, augmented differently each time"
    )
    feed: Literal["live", "lockstep", "stored"] = result("live")
    dual_bn: bool = result(True)
    dual_layer_norm: bool = result(False, description="twins for LayerNorm as well (ours)")
    steps: Positive | None = result(None, description="optimizer steps; or give epochs")
    epochs: Positive | None = result(None, description="passes over the real images")
    batch_size: Annotated[int, Field(ge=2)] = result(
        256, description="real + synthetic, per worker"
    )
    accumulate_steps: Positive = result(1, description="batches per optimizer step")
    real_fraction: Annotated[float, Field(gt=0, lt=1)] = result(0.5, description="of each batch")
    lambda_synth: Annotated[float, Field(ge=0)] = result(1.0, description="weight of L_synth")
    lambda_end: Annotated[float, Field(ge=0)] | None = result(
        None, description="go linearly from lambda_synth to this over the run"
    )
    class_balance: Fraction = result(
        0.0, description="draw classes by their counts (0) to equally often (1)"
    )
    label_smoothing: Fraction = result(0.0)
    loss: Literal["cross_entropy", "binary_cross_entropy"] = result("cross_entropy")
    target_threshold: Annotated[float, Field(ge=0, lt=1)] | None = result(
        None,
        description="binary_cross_entropy: a mixed image is wholly of each class that has more of it "
        "than this; default: in part",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = result(
        None, description="test an exponential moving average of the weights"
    )
    optimizer: OptimizerConfig = result(OptimizerConfig())
    dtype: Dtype = result("auto")
    compile: bool = result(False, description="torch.compile of the classifier")
    sync_bn: bool = result(False, description="BN statistics over all workers (on GPUs)")
    baseline: Literal["matched", "recipe", "both", "none"] = result(
        "matched",
        description="also train on real images alone: as many per step in as many steps as beside "
        "synthetic ones (matched), or the recipe at its own batch, rates and epochs (recipe)",
    )
    recipe_batch: Positive | None = result(
        None, description="images per step that the recipe's rates are made for"
    )
    warmup_images: Positive | None = result(None, description="live: default, two batches")
    memory_mb: Positive = how(
        8_192,
        description="of images that a worker keeps; more than that are read from storage as they are "
        "drawn",
    )
    decode_workers: Annotated[int, Field(ge=0)] | None = how(
        None,
        description="processes per worker that read, decode and crop; default: one less than num_cpus. "
        "0: one thread",
    )
    decode_on: Literal["node", "cluster"] = how(
        "node",
        description="cluster: decode_workers are tasks on any node's CPUs, where a GPU's own node has "
        "too few",
    )
    checkpoint_every: Positive = how(500)
    log_every: Positive = how(10)
    num_workers: Positive | tuple[Positive, Positive] = result(
        1, description="workers, or [fewest, most] on a cluster that shrinks and grows"
    )
    num_cpus: Annotated[float, Field(gt=0)] = how(1)
    num_gpus: Annotated[float, Field(ge=0)] = how(0)
    max_failures: Annotated[int, Field(ge=-1)] = how(
        3, description="failures without a new checkpoint between; -1: any number"
    )

    @field_validator("baseline", mode="before")
    @classmethod
    def _of_earlier_versions(cls, baseline: Any) -> Any:
        return of_today("training.baseline", baseline)

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give either steps or epochs")
        if not 1 <= round(self.batch_size * self.real_fraction) < self.batch_size:
            raise UserError(
                f"batch_size {self.batch_size} with real_fraction {self.real_fraction} leaves no "
                "room for both real and synthetic images"
            )
        if self.decode_on == "cluster" and not self.decode_workers:
            raise UserError(
                "decode_on: cluster needs decode_workers: how many CPUs decode for each worker"
            )
        if self.min_workers > self.max_workers:
            raise UserError(f"num_workers must be [fewest, most], got {self.num_workers}")
        if self.target_threshold is not None and self.loss != "binary_cross_entropy":
            raise UserError("target_threshold belongs to loss: binary_cross_entropy")
        if self.target_threshold == 0 and self.label_smoothing:
            raise UserError(
                "label_smoothing gives every class a part of each image, and target_threshold 0 would "
                "make it wholly of each: set one of them otherwise"
            )
        if "recipe" in self.baselines and not self.recipe:
            raise UserError(f"baseline {self.baseline} needs a training.recipe")
        if (self.mixup or self.cutmix) and (self.num_real % 2 or self.num_synth % 2):
            raise UserError(
                f"mixup and cutmix pair the images of a domain: {self.num_real} real and "
                f"{self.num_synth} synthetic images per batch must both be even"
            )
        return self

    @property
    def baselines(self) -> tuple[str, ...]:
        """The arms that are trained on real images alone."""
        return BASELINES[self.baseline]

    @property
    def min_workers(self) -> int:
        """Workers without which training does not start."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Workers at most."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def fits_in_memory(self, images: int) -> bool:
        """Whether a worker keeps so many decoded images in memory."""
        return images * 3 * self.image_size**2 <= self.memory_mb << 20

    @property
    def decoders(self) -> int:
        """Processes of each worker that decode."""
        given = self.decode_workers
        return max(0, int(self.num_cpus) - 1) if given is None else given

    @property
    def num_real(self) -> int:
        """Real images in each worker's batch."""
        return round(self.batch_size * self.real_fraction)

    @property
    def num_synth(self) -> int:
        """Synthetic images in each worker's batch."""
        return self.batch_size - self.num_real


class EvaluationConfig(Section):
    """How trained models are tested."""

    batch_size: Positive = how(256)
    bns: list[Literal["main", "aux", "average", "blend"]] = result(
        ["main", "aux"],
        description="of a dual-BN model, tested one by one; blend: both, by a weight that is chosen on "
        "the validation images",
    )
    dtype: Dtype = result(
        "float32",
        description="of the models in the test; auto: half where the device computes in it",
    )
    num_actors: Positive = how(1)
    num_cpus: Annotated[float, Field(gt=0)] = how(1)
    num_gpus: Annotated[float, Field(ge=0)] = how(0)


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = how(True)
    uri: str | None = how(None, description="default: sqlite in runs_dir")
    experiment: str = how("ray-synth")


class CorruptionConfig(Section):
    """Shifted copies of the test set, for the study of robustness."""

    kinds: list[str] = how(
        ["blur", "brightness", "contrast", "elastic", "jpeg", "noise", "rotate"],
        description="which of evaluation/corruption.py's",
    )
    severities: list[Annotated[int, Field(ge=1, le=5)]] = how([1, 3, 5])
    images: Positive = how(500, description="test images that are shifted, over all classes")


class StudiesConfig(Section):
    """What `ray-synth study` varies; all else is as the config says."""

    seeds: list[Annotated[int, Field(ge=0)]] = how([0, 1, 2], min_length=1)
    more_seeds: dict[str, Positive] = how(
        default_factory=dict,
        description="by study, how many seeds (0, 1, ...) it takes in place of seeds: small effects "
        "need more",
    )
    scale: Annotated[float, Field(gt=0)] = how(
        6.0, description="synthetic images per real one, where the study varies something else"
    )
    scales: list[Annotated[float, Field(gt=0)]] = how([1, 2, 4, 6, 12, 24])
    images_per_class: list[Positive] = how(
        [2, 5, 10, 20], description="real images per class, for the study low_data"
    )
    lambdas: list[Annotated[float, Field(ge=0)]] = how([0.1, 0.25, 0.5, 1.0, 2.0])
    real_fractions: list[Annotated[float, Field(gt=0, lt=1)]] = how([0.2, 0.3333, 0.5, 0.75])
    llms: dict[str, dict[str, Any]] = how(
        default_factory=dict,
        description="names to settings as under meaning.llm; default: the same one, asked otherwise",
    )
    generators: dict[str, dict[str, Any]] = how(
        default_factory=dict,
        description="names to settings as under generation; default: fewer and more steps, guidance",
    )
    pool: Place | None = how(
        None,
        description="a folder of other real images, or of WebDataset tars, that the study rivals "
        "retrieves from",
    )
    corruption: CorruptionConfig = how(CorruptionConfig())
    parallel: Positive | None = how(
        None, description="trainings at a time; default: what the cluster has room for"
    )


class TuningConfig(Section):
    """`ray-synth tune`: a LoRA of the image model, tuned on the real training images."""

    steps: Positive = how(500, description="optimizer steps")
    rank: Positive = how(8, description="of the LoRA's matrices")
    learning_rate: Annotated[float, Field(gt=0)] = how(1e-4)
    batch_size: Positive = how(4)
    checkpoint_every: Positive = how(100, description="steps that a kill costs at most")


class NodeTypeConfig(Section):
    """Nodes of one kind, as many as an autoscaling cluster can have of them."""

    count: Positive = how()
    num_cpus: Annotated[float, Field(ge=0)] = how()
    num_gpus: Annotated[float, Field(ge=0)] = how(0)
    memory_gb: Annotated[float, Field(ge=0)] = how(0, description="of each node; 0: not known")
    accelerator: str = how("", description="the GPU's type: A10G, L4, A100-80G, H100, ...")


class ReachConfig(Section):
    """What an autoscaling cluster can grow to, nodes that run now included.

    Either types of nodes, or the cluster launcher's file.
    """

    nodes: list[NodeTypeConfig] = how(default_factory=list)
    file: str | None = how(None, description="the YAML file of `ray up`")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {"nodes": value}
        return {"file": value} if isinstance(value, str) else value


class TakeOverConfig(Section):
    """A finished run whose meanings, scenes and images are kept, where its classes are this run's."""

    run: Place = result(description="its directory: runs/birds")
    renamed: dict[str, str] = result(
        default_factory=dict, description="its name of a class -> the name now"
    )
    split: dict[str, list[str]] = result(
        default_factory=dict, description="its class -> the classes it became, which begin anew"
    )


class ClusterConfig(Section):
    """The Ray cluster: an address to join, or what to start on this machine."""

    address: str | None = how(None, description="default: RAY_ADDRESS, else a local Ray")
    num_cpus: Positive | None = how(None, description="logical CPUs of a local Ray")
    num_gpus: Annotated[int, Field(ge=0)] | None = how(None)
    max_reach: ReachConfig | None = how(
        None,
        description="what autoscaling can reach: a list of node types, or the path of the cluster "
        "launcher's file",
    )
    no_progress_timeout_s: Positive = how(900, description="a stalled pipeline is an error")
    price_per_gpu_hour: Annotated[float, Field(ge=0)] = how(
        0, description="for the cost of generation, in your currency"
    )
    price_per_cpu_hour: Annotated[float, Field(ge=0)] = how(0)


class Config(Section):
    """One run, from class names to a report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = how()
    runs_dir: Place = how("runs", description="path or URI (s3://, gs://, abfs://, ...)")
    seed: Annotated[int, Field(ge=0)] = result(0)
    data: DataConfig = result()
    take_over: TakeOverConfig | None = result(
        None, description="classes came or went: go on from an earlier run"
    )
    meaning: MeaningConfig = result(MeaningConfig())
    prompting: PromptingConfig = result(PromptingConfig())
    generation: GenerationConfig = result(GenerationConfig())
    training: TrainingConfig = result()
    evaluation: EvaluationConfig = result(EvaluationConfig())
    tracking: TrackingConfig = how(TrackingConfig())
    tuning: TuningConfig = how(TuningConfig())
    studies: StudiesConfig = how(StudiesConfig())
    cluster: ClusterConfig = how(ClusterConfig())

    @model_validator(mode="after")
    def _blends_on_validation(self) -> Config:
        if "blend" in self.evaluation.bns and not self.data.validation:
            raise UserError(
                "evaluation.bns: blend is chosen on validation images, and data.validation holds none "
                "out: say how many of each class it shall (10), or take average"
            )
        return self

    @model_validator(mode="after")
    def _can_practise(self) -> Config:
        practice = self.prompting.practice
        if practice is None:
            return self
        if self.take_over is not None:
            raise UserError(
                "prompting.practice plans by what the model lacks, and take_over keeps an earlier plan's "
                "images: leave one of them out"
            )
        if practice.stop is not None and not self.data.validation:
            raise UserError(
                "prompting.practice.stop compares rounds on validation images, and data.validation holds "
                "none out: say how many of each class it shall (50), or leave stop out"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML), and validate.

    Raises:
        UserError: the file is missing or not a mapping, or a key or value is wrong; the message names
            each one and, for a misspelt key, the nearest that exists.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no config file at {path}; `ray-synth init --images DIR` writes one")
    text = read_text(path)
    if not text.strip("\0 \n"):
        raise UserError(
            f"{path} is empty, as a full disk leaves files; `ray-synth init --images DIR` writes one"
        )
    values = read_typed(text, Config, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings; `ray-synth init --images DIR` writes one")
    for override in overrides or []:
        _apply(values, override)
    _merge_recipe(values)
    return parse_config(values, origin=str(path))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes_result(key: str) -> bool:
    """Whether a setting, by its dotted key, is a `result` one; False for an unknown key.

    Keys of the user's own, inside a mapping such as `prompting.mix`, are as the mapping is.
    """
    current: Any = Config
    named_by_user = False
    for part in key.split("."):
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(part)
            if field is None:
                return named_by_user  # a test set's own name may hold dots: data.ood.v2.0.path
            if field.json_schema_extra == {"changes": "how"}:
                return False
            current = _strip(field.annotation)
        elif get_origin(current) is dict:
            current = _strip(get_args(current)[1])
            named_by_user = True
        else:
            break
    return True


def default_of(key: str) -> Any:
    """The default of a setting by its dotted key; None where it has none, or there is no such setting."""
    *parents, name = key.split(".")
    section = _section_at(Config, parents)
    field = section.model_fields.get(name) if section else None
    if field is None or field.is_required():
        return None
    default = field.get_default(call_default_factory=True)
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default


def read_run_config(folder: Any) -> dict[str, Any]:
    """The settings in a run's config.yaml, without those that this version no longer has, and without
    the packages' versions (see `run_versions`).

    Args:
        folder: the run's `Folder`.
    """
    values = kept_config(folder)
    values.pop("versions", None)
    return without_retired(values)


def kept_config(folder: Any) -> dict[str, Any]:
    """A run's config.yaml as it was written, by whatever version.

    Raises:
        DamagedFile: it is cut off, or no mapping of settings.
    """
    import yaml

    from ray_synth.storage.damage import damaged

    try:
        values = yaml.safe_load(folder.read_bytes("config.yaml")) or {}
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())[:150]
        raise damaged(folder.address("config.yaml"), why) from None
    if not isinstance(values, dict):
        raise damaged(folder.address("config.yaml"), "it holds no settings")
    return values


def run_versions(folder: Any) -> dict[str, str]:
    """The versions of the packages that made a run, from its config.yaml."""
    return kept_config(folder).get("versions") or {}


def load_run_config(folder: Any) -> Config:
    """The config that a run's folder keeps.

    Raises:
        UserError: there is no run, or its settings are not valid now.
    """
    if not folder.exists("config.yaml"):
        raise UserError(f"no run at {folder.address()}: it has no config.yaml; name one with --run")
    return parse_config(read_run_config(folder), origin=folder.address("config.yaml"))


def without_retired(values: dict[str, Any]) -> dict[str, Any]:
    """Settings without those of `RETIRED`."""
    values = copy.deepcopy(values)
    for name in RETIRED:
        *parents, leaf = name.split(".")
        section: Any = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(leaf, None)
    return values


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> dict[str, Any]:
    """Settings of `training` by a recipe's name, or from a YAML file.

    Raises:
        UserError: there is none of this name (with the nearest), or it holds a wrong setting.
    """
    path = RECIPES / f"{name}.yaml"
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name)
    if not path.is_file():
        hint = did_you_mean(name, recipe_names())
        raise UserError(f"training.recipe: no recipe {name!r}; {hint} Or give a YAML file")
    values = read_typed(read_text(path), TrainingConfig, str(path))
    if not isinstance(values, dict):
        raise UserError(f"training.recipe: {path} holds no settings")
    parse_config(values, origin=f"recipe {path.name}", model=TrainingConfig)
    return values


def _merge_recipe(values: dict[str, Any]) -> None:
    """Put a named recipe under what the user gives."""
    given = values.get("training")
    if not isinstance(given, dict) or not given.get("recipe"):
        return
    recipe = load_recipe(given["recipe"])
    if "steps" in given or "epochs" in given:
        recipe.pop("epochs", None)
        recipe.pop("steps", None)
    if "model" in given and given["model"] != recipe.get("model"):
        recipe.pop("model_kwargs", None)  # of another model
    for key in ("optimizer", "augment", "model_kwargs"):
        if isinstance(recipe.get(key), dict) and isinstance(given.get(key), dict):
            given = {**given, key: {**recipe[key], **given[key]}}
    values["training"] = {**recipe, **given}


def parse_config(
    values: dict[str, Any], *, origin: str = "config", model: type[BaseModel] = Config
) -> Any:
    """Validate a mapping as `model`. Raises UserError with one line per problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(*problem, model) for problem in problems(error, model)]
        raise UserError(f"{origin}:\n  " + "\n  ".join(lines)) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override!r}: expected a.b=value")
    node: Any = values
    annotation: Any = Config
    left = key.strip()
    while True:
        part = _first_part(node, left)
        annotation, left = child(annotation, part), left[len(part) + 1 :]
        if not left:
            break
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {part} is a value, not a section")
    node[part] = typed_value(text, annotation, f"--set {override!r}")


def _first_part(node: dict[str, Any], key: str) -> str:
    """`data` of `data.train`; a name that is there already may hold dots: a test set `v2.0`."""
    there = [name for name in node if isinstance(name, str) and f"{key}.".startswith(f"{name}.")]
    return max(there, key=len, default=key.partition(".")[0])


def _explain(location: list[Any], hint: str, problem: ErrorDetails, model: type[BaseModel]) -> str:
    dotted = ".".join(map(str, location))
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        value = problem["input"]
        shown = not isinstance(value, dict) and not holds_secret(str(value))
        given = f" (given: {value!r})" if shown else ""
        return redact(f"{dotted or model.__name__}: {message}{f' ({hint})' if hint else ''}{given}")
    # A recipe, or another part of a config, is validated on its own: its names lack the first parts.
    part = model is not Config
    retired = [n for n in RETIRED if n == dotted or (part and n.endswith(f".{dotted}"))]
    if retired:
        return f"{dotted}: removed; {RETIRED[retired[0]]}"
    section = _section_at(model, location[:-1])
    known = list(section.model_fields) if section else []
    return f"{dotted}: unknown key; {did_you_mean(location[-1], known, known_as='known keys')}"


def _section_at(model: type[BaseModel], location: list[Any]) -> type[BaseModel] | None:
    """The section class that a validation error's location lies in."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            if part not in current.model_fields:
                return None
            current = _strip(current.model_fields[part].annotation)
        elif get_origin(current) is dict:
            current = _strip(get_args(current)[1])
        elif get_origin(current) is list:
            current = _strip(get_args(current)[0])
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _strip(annotation: Any) -> Any:
    """`X | None` and `Annotated[X, ...]` as X."""
    if get_origin(annotation) is Annotated:
        return _strip(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        return _strip(options[0]) if len(options) == 1 else annotation
    return annotation
