"""What sections are made of: types, marks, and the refusal of unknown keys and of secrets."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticUndefined

from ray_synth.errors import UserError
from ray_synth.storage.secrets import refuse_in_setting

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
# Settings whose keys are another program's.
FREE = ("generator_kwargs", "model_kwargs", "kwargs", "schedule_kwargs", "llms", "generators")
# Where the secret of a URL belongs, by the setting's name.
INSTEAD_OF_SECRETS = {
    "base_url": "set the variable that api_key_env names (OPENAI_API_KEY)",
    "uri": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; for a "
    "database PGPASSWORD, or its driver's own file",
}


def at_home(value: Any) -> Any:
    """`~/photos` as the folder that it is; all else as it is."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


# A path or URI; it goes to config.yaml.
Place = Annotated[str, AfterValidator(at_home)]


def _in_order(value: int | tuple[int, int]) -> int | tuple[int, int]:
    if isinstance(value, tuple) and value[0] > value[1]:
        raise UserError(f"give [fewest, most], not {list(value)}")
    return value


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
