"""Which of a run's trained models is meant: its arm, its BNs, and what training wrote of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_synth.config import read_run_config
from ray_synth.data.marks import ValueRange
from ray_synth.errors import UserError, did_you_mean
from ray_synth.storage.folder import Folder

if TYPE_CHECKING:
    from torch import nn

RECOMMENDED = "mixed.main"  # the model of the report's headline


@dataclass(frozen=True)
class Weights:
    """Which of a run's trained models is meant: `mixed.main` is arm `mixed` with its main BNs.

    Attributes:
        card: what training wrote of the arm (`models/<arm>.json`).
    """

    folder: Folder
    arm: str
    bn: str
    card: dict[str, Any]

    @property
    def value_range(self) -> ValueRange | None:
        """The values of greys that are black and white, as the run's training set has them."""
        train = (read_run_config(self.folder).get("data") or {}).get("train") or {}
        return value_range_of(train.get("value_range"))

    @property
    def name(self) -> str:
        return self.arm if self.arm != "mixed" else f"{self.arm}.{self.bn}"

    def load(self) -> nn.Module:
        """The plain timm model in float32, in eval mode. Raises UserError where its file is not whole."""
        from ray_synth.storage.classifiers import load_model

        return load_model(self.folder, self.arm, self.bn, self.card)


def choose_weights(folder: Folder, name: str | None = None) -> Weights:
    """The weights of a run by name, such as `mixed.average` or `real_only`.

    Args:
        name: default: `RECOMMENDED`.

    Raises:
        UserError: the run has none of that name, or none at all; says which there are.
    """
    models = folder.child("models")
    files = models.names(".safetensors")
    known = [file.removesuffix(".safetensors") for file in files]
    if not known:
        raise UserError(
            f"{folder.address()} has no trained model yet: `ray-synth run` (or `train`) with its config "
            "trains one"
        )
    wanted = name or RECOMMENDED
    full = wanted if "." in wanted else f"{wanted}.main"
    if full not in known:
        there = [given.removesuffix(".main") if given != RECOMMENDED else given for given in known]
        raise UserError(
            f"{folder.address()} has no model {wanted!r}: {did_you_mean(wanted, there)}"
        )
    arm, _, bn = full.rpartition(".")
    return Weights(folder, arm, bn, models.read_json(f"{arm}.json"))


def value_range_of(given: Any) -> ValueRange | None:
    """Two finite numbers that differ, or None."""
    if not isinstance(given, list) or [type(v) in (int, float) for v in given] != [True, True]:
        return None
    low, high = map(float, given)
    return (low, high) if math.isfinite(high - low) and low != high else None
