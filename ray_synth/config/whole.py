"""The whole config of a run, and its settings by their dotted names."""

from __future__ import annotations

from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Field, model_validator

from ray_synth.config.cluster import ClusterConfig, TrackingConfig
from ray_synth.config.data import DataConfig, TakeOverConfig
from ray_synth.config.generation import GenerationConfig, TuningConfig
from ray_synth.config.lookup import bare_type, section_at
from ray_synth.config.meaning import MeaningConfig
from ray_synth.config.prompting import PromptingConfig
from ray_synth.config.section import Place, Section, how, result
from ray_synth.config.studies import StudiesConfig
from ray_synth.config.training import EvaluationConfig, TrainingConfig
from ray_synth.errors import UserError


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
            current = bare_type(field.annotation)
        elif get_origin(current) is dict:
            current = bare_type(get_args(current)[1])
            named_by_user = True
        else:
            break
    return True


def default_of(key: str) -> Any:
    """The default of a setting by its dotted key; None where it has none, or there is no such setting."""
    *parents, name = key.split(".")
    section = section_at(Config, parents)
    field = section.model_fields.get(name) if section else None
    if field is None or field.is_required():
        return None
    default = field.get_default(call_default_factory=True)
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default
