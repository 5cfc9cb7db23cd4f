"""Classifiers of timm, by name or as a run's folder keeps them: a card, and plain weights beside it.

In: a name and numbers, or `models/<arm>.json` with `models/<arm>.<bn>.safetensors`. Out: the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_synth.errors import UserError, did_you_mean, first_line
from ray_synth.storage.checkpoints import check_timm

if TYPE_CHECKING:
    from torch import nn

    from ray_synth.storage.folder import Folder


def create_classifier(
    name: str,
    *,
    num_classes: int,
    pretrained: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm model by name.

    Args:
        name: a timm model (`resnet50`, `resnet50.a1_in1k`), or with a prefix of timm's, such as
            `hf-hub:` or `local-dir:`.
        num_classes: size of the classifier.
        pretrained: fetch timm's weights.
        model_kwargs: further arguments of the timm model.

    Raises:
        UserError: for an unknown name (with the nearest ones), for arguments that the model
            refuses, or for one whose configuration has keys that are not listed.
    """
    import timm

    if ":" not in name and not timm.is_model(name):
        raise UserError(
            f"unknown timm model {name!r}: {did_you_mean(name, timm.list_models(), most=3)}"
        )
    check_timm(name)
    try:
        return timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, **(model_kwargs or {})
        )
    except Exception as error:  # of timm, torch, the hub or a file
        if model_kwargs:
            raise UserError(f"timm model {name!r} refuses model_kwargs: {error}") from error
        if not pretrained and ":" not in name:
            raise
        raise UserError(
            f"timm model {name!r} cannot be loaded ({first_line(error)}): give training.model a name, a "
            "hub id or a local-dir: that this machine can reach, and for training.pretrained one "
            "with weights; or training.checkpoint a local file"
        ) from error


def load_model(folder: Folder, arm: str, bn: str, card: dict[str, Any]) -> nn.Module:
    """A model as training exports it, or with timm's weights if its card says so; in eval mode.

    Args:
        folder: with `models/` in it.
        card: `models/<arm>.json`.

    Raises:
        UserError: the file is gone, or not whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    pretrained = card.get("pretrained", False)
    model = create_classifier(
        card["model"],
        num_classes=len(card["class_names"]),
        model_kwargs=card["model_kwargs"],
        pretrained=pretrained,
    )
    if not pretrained:
        name = f"models/{arm}.{bn}.safetensors"
        try:
            model.load_state_dict(load(folder.read_bytes(name)))
        except (SafetensorError, RuntimeError, FileNotFoundError) as error:
            raise UserError(
                f"{folder.address(name)} is not the whole file that training wrote "
                f"({first_line(error)}); train again with --force-stage training"
            ) from None
    return model.eval()
