"""Reads a Serve deploy config and refuses what Ray would silently ignore: misspelt keys.

Ray's own schema lets unknown keys pass, for configs of newer versions; a misspelt `num_replica` then
changes nothing and says nothing. Here every key is held against that same schema.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from ray_synth.config import RETIRED, ClipConfig, LlmConfig, parse_config
from ray_synth.errors import UserError, did_you_mean
from ray_synth.service.app import Disambiguation, ServeConfig
from ray_synth.service.clip_deployment import ClipDeployment
from ray_synth.service.images_app import ImagesConfig
from ray_synth.service.llm_deployment import LlmDeployment

OUR_APP = ("ray_synth.service.app:build", "ray_synth.service.app.build")
IMAGES_APP = ("ray_synth.service.images_app:build", "ray_synth.service.images_app.build")
# Where the app was while `serve` was a package: configs of then name it so.
MOVED_FROM = ("serve.app:build", "serve.app.build")
_DEPLOYMENTS: tuple[Any, ...] = (Disambiguation, LlmDeployment, ClipDeployment)
OUR_DEPLOYMENTS = tuple(deployment.name for deployment in _DEPLOYMENTS)
# Fields that are typed as plain mappings, though Ray reads them by these models.
READ_AS: dict[tuple[type[BaseModel], str], type[BaseModel]] = {
    (ServeApplicationSchema, "autoscaling_policy"): AutoscalingPolicy,
    (ServeConfig, "autoscaling"): AutoscalingConfig,
}
# Where the same settings lie in the config of a run.
SECTIONS: dict[type[BaseModel], str] = {LlmConfig: "meaning.llm", ClipConfig: "meaning.clip"}
# Ray imports these while it validates; they need to exist on the cluster alone.
IMPORTED = ("policy_function", "request_router_class")


class Part(NamedTuple):
    """A value of the config that is read by a model, and where it stands."""

    place: str
    value: Any
    model: type[BaseModel]
    on_its_own: bool  # whether no model above it validates its values


def load_serve_config(path: str | Path) -> dict[str, Any]:
    """The values of a Serve config (`serve run`, `serve deploy`), checked by `check_serve_config`.

    Raises:
        UserError: the file is missing, not YAML or not a mapping, or a key or value in it is wrong;
            the message names each one and, for a misspelt key, the nearest that exists.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no Serve config at {path}; serve/config.yaml is one to start from")
    try:
        values = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    check_serve_config(values, origin=str(path))
    return values


def check_serve_config(values: Any, *, origin: str = "config") -> None:
    """Hold a config against Ray's schema, and `args` of our app against `ServeConfig`.

    Mappings with keys of the user's own stay free: runtime_env, user_config, resources, kwargs.

    Raises:
        UserError: with one line per problem.
    """
    if not isinstance(values, dict):
        raise UserError(f"{origin} holds no settings: it must be a mapping of Serve's options")
    root = Part("", values, ServeDeploySchema, True)
    parts = [root, *_parts_of(root)]
    # Wrong keys first, alone: a value that would then be missing may just be misspelt.
    problems = [line for part in parts for line in _wrong_keys(part)]
    if not problems:
        problems = [line for part in parts if part.on_its_own for line in _wrong_values(part)]
    if problems:
        lines = dict.fromkeys(problems)  # once, what both Ray and the part itself refuse
        raise UserError(f"{origin}:\n  " + "\n  ".join(lines))


def _parts_of(part: Part) -> Iterator[Part]:
    """The parts below a part, at any depth."""
    if not isinstance(part.value, dict):
        return
    for key, value in part.value.items():
        if key not in part.model.model_fields:
            continue
        annotation: Any = part.model.model_fields[key].annotation
        special = READ_AS.get((part.model, key))
        if key == "args" and part.model is ServeApplicationSchema:
            special = _arguments_of(part.value.get("import_path")) or special
        many = isinstance(value, list)
        model, free = _reading(annotation, many=many)
        model, free = (special, True) if special else (model, free)
        if model is None or value is None:
            continue
        place = f"{part.place}.{key}".removeprefix(".")
        entries = [(f"{place}.{i}", v) for i, v in enumerate(value)] if many else [(place, value)]
        for where, entry in entries:
            below = Part(where, entry, model, free)
            yield below
            yield from _parts_of(below)


def _reading(annotation: Any, *, many: bool) -> tuple[type[BaseModel] | None, bool]:
    """The model that a field's value, or each entry of its list, is read by; and whether the field
    takes any mapping as well, unread until it is deployed."""
    options = (annotation, *get_args(annotation)) if _is_union(annotation) else (annotation,)
    if many:
        items = [get_args(option)[0] for option in options if get_origin(option) is list]
        return _reading(items[0], many=False) if items else (None, False)
    models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
    free = any(option is dict or get_origin(option) is dict for option in options)
    return (models[0], free) if models else (None, False)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) not in (None, list, dict, tuple)


def _arguments_of(import_path: Any) -> type[BaseModel] | None:
    """What reads `args` of an app of ours."""
    if import_path in IMAGES_APP:
        return ImagesConfig
    return ServeConfig if import_path in OUR_APP else None


def _is_ours(part: Part) -> bool:
    return part.model is ServeApplicationSchema and part.value.get("import_path") in OUR_APP


def _wrong_keys(part: Part) -> Iterator[str]:
    """Lines on unknown keys, and on deployments that our app has none of."""
    if not isinstance(part.value, dict):
        yield f"{part.place}: give a mapping, not {part.value!r}"
        return
    for key in part.value:
        if key not in part.model.model_fields:
            dotted = f"{part.place}.{key}".removeprefix(".")
            gone = RETIRED.get(f"{SECTIONS.get(part.model, '')}.{key}")
            hint = f"removed; {gone}" if gone else None
            yield f"{dotted}: {hint or 'unknown key; ' + did_you_mean(key, part.model.model_fields)}"
    if part.model is ServeApplicationSchema and part.value.get("import_path") in MOVED_FROM:
        yield f"{part.place}.import_path: the app has moved: write {OUR_APP[0]}"
    deployments = part.value.get("deployments") if _is_ours(part) else None
    for position, entry in enumerate(deployments if isinstance(deployments, list) else []):
        name = entry.get("name") if isinstance(entry, dict) else None
        if name is not None and name not in OUR_DEPLOYMENTS:
            where = f"{part.place}.deployments.{position}.name"
            yield f"{where}: no deployment of this app: {name!r}; {did_you_mean(name, OUR_DEPLOYMENTS)}"


def _wrong_values(part: Part) -> Iterator[str]:
    """Lines on values that Ray or our app would refuse."""
    # a copy: some of Ray's validators write into what they are given
    values = _without_imports(copy.deepcopy(part.value))
    if part.model is AutoscalingConfig:
        # Ray puts them over defaults of its own, where fewest replicas may be given alone
        values.setdefault("max_replicas", 1_000_000)
    prefix = f"{part.place}." if part.place else ""
    try:
        parse_config(values, model=part.model)
    except UserError as error:
        yield from (prefix + line.strip() for line in str(error).splitlines()[1:])
    except (NotImplementedError, TypeError, AttributeError) as error:
        yield f"{part.place or 'a deployment'}: {error}"  # raised past pydantic, by Ray's validators


def _without_imports(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_imports(entry) for entry in value]
    if isinstance(value, dict):
        return {k: _without_imports(v) for k, v in value.items() if k not in IMPORTED}
    return value


__all__ = ["check_serve_config", "load_serve_config"]
