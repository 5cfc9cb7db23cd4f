"""Learners as training publishes them, small and sure of themselves, without training."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save

from ray_synth.config import PracticeGuidanceConfig
from ray_synth.generators.learner import Steering
from ray_synth.storage.classifiers import create_classifier
from ray_synth.storage.folder import Folder

CLASSES = tuple("0123456789")
SURE = 300.0  # logits of random weights are nearly equal


def publish(
    run: Folder, number: int = 0, *, size: int = 32, sure: float = SURE, **card: Any
) -> str:
    """Write a learner of random weights; its folder's name in the run."""
    name = f"practice/learner-{number:03d}"
    torch.manual_seed(number)
    model = create_classifier("test_resnet", num_classes=len(CLASSES)).eval()
    with torch.no_grad():
        model.fc.weight.mul_(sure)
    facts = {
        "arm": "mixed",
        "model": "test_resnet",
        "model_kwargs": {},
        "class_names": list(CLASSES),
        "image_size": size,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "bns": ["main"],
    }
    folder = run.child(name)
    folder.write_bytes("models/mixed.main.safetensors", save(model.state_dict()))
    folder.write_json("models/mixed.json", {**facts, **card})
    return name


def guiding(run: Folder, number: int = 0, *, scale: float = 0.3, **card: Any) -> Steering:
    """A published learner that guides the sampler."""
    return Steering(run, publish(run, number, **card), PracticeGuidanceConfig(scale=scale))
