"""Named recipes of training: defaults for what a config does not give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_synth.config.parsing import parse_config
from ray_synth.config.training import TrainingConfig
from ray_synth.errors import UserError, did_you_mean
from ray_synth.storage.texts import read_text
from ray_synth.storage.typed_yaml import read_typed

RECIPES = Path(__file__).parents[1] / "training" / "recipes"


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


def merge_recipe(values: dict[str, Any]) -> None:
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
