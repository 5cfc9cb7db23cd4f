"""The models that resolve what class names mean (paper, section 3.1)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ray_synth.config.section import (
    Device,
    Dtype,
    Fraction,
    Positive,
    Replicas,
    Section,
    how,
    result,
)
from ray_synth.errors import UserError


def _on_this_machine(value: str) -> str:
    if "://" in value:
        raise UserError("answers are kept in an SQLite file, which needs a local disk")
    return value


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
