"""What a learner's guidance and selection do to images of the embedded model, and what they cost.

A learner trained on a few digits steers; a judge trained on many says whether an image still shows its
digit. Times are of the processor, in one thread. Without Ray: python jobs/bench_guidance.py --images 160
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ray_synth.config import GenerationConfig, PracticeGuidanceConfig
from ray_synth.data.digits import CLASS_NAMES, load_digits
from ray_synth.generation.maker import attempt_seed
from ray_synth.generators.diffusion import DiffusionGenerator
from ray_synth.generators.learner import Steering, SteeringLearner
from ray_synth.storage.folder import Folder
from ray_synth.training.augmentation import POLICIES, augment_batch
from ray_synth.training.recipe import build_model

MODEL = "test_resnet"  # timm's smallest
PROMPT = "the number {}, white on a black background, handwritten"  # as the real digits are
SIZE, BATCH, CANDIDATES = 32, 32, 4


def publish(run: Folder, number: int, per_class: int, steps: int) -> Steering:
    """Train on the first real digits of each class; the learner's folder is written as a run does."""
    pixels, labels = load_digits("digits", "train")
    names = np.array(labels)
    rows = np.concatenate([np.flatnonzero(names == name)[:per_class] for name in CLASS_NAMES])
    real = torch.from_numpy(pixels[rows]).float()[:, None].expand(-1, 3, -1, -1) / 255
    real = F.interpolate(real, size=(SIZE, SIZE), mode="bilinear")
    targets = torch.tensor([CLASS_NAMES.index(name) for name in names[rows]])
    torch.manual_seed(number)
    model = build_model(MODEL, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    draws = torch.Generator().manual_seed(number)
    for _ in range(steps):
        some = torch.randint(len(real), (BATCH,), generator=draws)
        x = (augment_batch(real[some], POLICIES["digits"], draws) - 0.5) / 0.5
        optimizer.zero_grad()
        F.cross_entropy(model(x), targets[some]).backward()
        optimizer.step()
        schedule.step()
    name = f"practice/learner-{number:03d}"
    card = {
        "model": MODEL, "model_kwargs": {}, "class_names": list(CLASS_NAMES),
        "image_size": SIZE, "crop_pct": 1.0, "interpolation": "bilinear", "mean": [0.5] * 3,
        "std": [0.5] * 3, "bns": ["main"],
    }  # fmt: skip
    run.child(name).write_bytes("models/mixed.main.safetensors", save(model.state_dict()))
    run.child(name).write_json("models/mixed.json", card)
    return Steering(run, name)


def told(learner: SteeringLearner, images: list[Any], labels: list[int]) -> tuple[float, float]:
    """Mean entropy, and the share of images whose digit is found."""
    stack = np.stack([np.asarray(image) for image in images])
    with torch.no_grad():
        logits = learner.logits(torch.from_numpy(stack).permute(0, 3, 1, 2) / 255)
    found = (logits.argmax(1) == torch.tensor(labels)).float().mean().item()
    return float(np.mean(learner.entropies(images))), found  # type: ignore[arg-type]


def measure(images: int, steps: int, scales: list[float], learner: Any, judge: Any) -> None:
    config = GenerationConfig(
        width=64, height=64, num_inference_steps=steps, guidance_scale=1.0, batch_size=20, num_threads=1,
        dtype="float32",
    )  # fmt: skip
    labels = [at % 10 for at in range(images)]
    others: dict[str, Any] = {"negative_prompt": ""}
    rows: list[dict[str, Any]] = [
        {"prompt": PROMPT.format(label), **others, "seed": at} for at, label in enumerate(labels)
    ]
    generator = DiffusionGenerator(config)
    generator.generate(rows[:20])

    def line(name: str, made: list[Any], seconds: float) -> None:
        entropy, known = told(learner, made, labels)
        judged, right = told(judge, made, labels)
        print(
            f"{steps} steps, {name:14} learner: entropy {entropy:.3f}, right {known:.3f}; judge: "
            f"entropy {judged:.3f}, right {right:.3f}; {1000 * seconds / images:.0f} ms an image",
            flush=True,
        )

    def timed() -> tuple[list[Any], float]:
        started = time.process_time()
        return generator.generate(rows), time.process_time() - started

    line("as it is", *timed())
    for scale in scales:
        generator.guide(learner, PracticeGuidanceConfig(scale=scale))
        generator.generate(rows[:20])
        line(f"guided {scale:g}", *timed())
    generator.guide(None, None)
    started = time.process_time()
    tries = [
        generator.generate([{**row, "seed": attempt_seed(row["seed"], i)} for row in rows])
        for i in range(CANDIDATES)
    ]
    entropies = np.array([learner.entropies(made) for made in tries])
    best = [tries[i][at] for at, i in enumerate(entropies.argmax(0))]
    line(f"1 of {CANDIDATES}", best, time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--scales", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    run = Folder(tempfile.mkdtemp())
    learner = SteeringLearner(publish(run, 1, per_class=5, steps=100), "cpu")
    judge = SteeringLearner(publish(run, 2, per_class=250, steps=300), "cpu")
    for steps in asked.steps:
        measure(asked.images, steps, asked.scales, learner, judge)


if __name__ == "__main__":
    main()
