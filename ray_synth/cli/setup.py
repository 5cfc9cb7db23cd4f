"""`ray-synth init`: looks at a folder of images and writes a config that suits it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ray_synth.config import SourceConfig
from ray_synth.data.dataset import Index, load_index, read_index, select
from ray_synth.errors import UserError
from ray_synth.generators.knowledge import strangers

TRAIN_NAMES, TEST_NAMES = ("train", "training"), ("test", "val", "valid", "validation")


def write_config(
    images: Path, out: Path, *, test: Path | None = None, name: str | None = None
) -> dict[str, Any]:
    """Write `out` for an image folder: `images/CLASS/*.jpg`, or with train/ and test/ inside.

    Returns:
        What was found: class counts, sizes, and where training and test images lie.

    Raises:
        UserError: the folder is missing or empty, has no test images, or `out` exists already.
    """
    if out.exists():
        raise UserError(f"{out} exists already; name another with --out")
    if not images.is_dir():
        raise UserError(f"no such folder: {images}")
    train = _first(images, TRAIN_NAMES) or images
    test = test or _first(images, TEST_NAMES)
    if test is None:
        raise UserError(
            f"{images} has no test images: put them in {images}/test/CLASS/ (and the others in "
            f"{images}/train/CLASS/), or name a folder with --test. What is gained can only be "
            "shown on real images that were not trained on."
        )
    index = load_index(SourceConfig(format="imagefolder", path=str(train)))
    tested = load_index(SourceConfig(format="imagefolder", path=str(test)), index.class_names)
    counts = index.counts()
    sizes = _sizes(index)
    side = int(np.median([min(size) for size in sizes])) if sizes else 224
    found = {
        "train": str(train),
        "test": str(test),
        "counts": counts,
        "num_train": len(index),
        "num_test": len(tested),
        "median_side": side,
    }
    run_name = name or images.resolve().name.lower().replace(" ", "-") or "images"
    config = _config(run_name, found)
    found["embedded"] = config["generation"]["model"] == "embedded"
    header = (
        f"# Written by `ray-synth init` for {len(counts)} classes and {len(index)} training images "
        f"of about {side} pixels.\n# Run it with: ray-synth run --config {out}\n"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(header + yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    return found


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _sizes(index: Index, images: int = 64) -> list[tuple[int, int]]:
    """Sizes of a few images, from their headers; unreadable ones are left to the run itself."""
    sizes = []
    per_class = max(1, images // len(index.class_names))
    few = select(index, per_class, seed=0)
    for row in read_index(few.take(np.arange(min(len(few), images)))):
        try:
            with Image.open(io.BytesIO(row["image"])) as image:
                sizes.append(image.size)
        except OSError:
            continue
    return sizes


def _config(name: str, found: dict[str, Any]) -> dict[str, Any]:
    import torch

    gpus = torch.cuda.device_count()
    big = found["median_side"] >= 112
    image_size = 224 if big else max(32, 32 * round(found["median_side"] / 32))
    steps = int(np.clip(found["num_train"] * 60 // 64, 300, 50_000))
    generation: dict[str, Any] = {
        "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "width": 512,
        "height": 512,
        "num_inference_steps": 20,
        "guidance_scale": 5.0,
        "batch_size": 16,
        "pool": {"min_size": 1, "max_size": max(1, gpus - 1)},
        "num_gpus": 1 if gpus > 1 else 0.5,
    }
    if not gpus:
        # Without a GPU only the embedded model is quick; it knows digits, and little else.
        generation = {
            "model": "embedded",
            "width": 64,
            "height": 64,
            "num_inference_steps": 4,
            "guidance_scale": 1.0,
            "batch_size": 32,
            "num_cpus": 0.5,
        }
    return {
        "name": name,
        "data": {
            "train": {"format": "imagefolder", "path": found["train"]},
            "test": {"format": "imagefolder", "path": found["test"]},
        },
        "meaning": {
            "llm": {"model": "embedded", "num_cpus": 0.5},
            "clip": {"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k", "num_cpus": 0.5}
            if gpus
            else {"model": "embedded", "num_cpus": 0.5},
        },
        "prompting": {"multiplier": 6, "mix": {"contextual": 0.5, "stylized": 0.5}},
        "generation": generation,
        "training": {
            "model": "resnet50" if big and gpus else "resnet18",
            "image_size": image_size,
            "augment": "imagenet" if big else {"policy": "none", "flip": 0.5, "translate": 0.1},
            "steps": steps,
            "batch_size": 128,
            "num_cpus": 1 if gpus else 0.5,
            "num_gpus": (1 if gpus > 1 else 0.5) if gpus else 0,
        },
        "evaluation": {"num_cpus": 0.5, "num_gpus": 0.5 if gpus else 0},
    }


def describe(found: dict[str, Any], out: Path) -> str:
    """What was found, and what to do next."""
    counts = found["counts"]
    fewest, most = min(counts, key=counts.get), max(counts, key=counts.get)
    each = f"{counts[fewest]} of {fewest!r} to {counts[most]} of {most!r}"
    if counts[fewest] == counts[most]:
        each = f"{counts[most]} of each class"
    unfit = strangers(list(counts)) if found["embedded"] else None
    return "\n".join(
        [
            f"{len(counts)} classes, {found['num_train']} training images in {found['train']}"
            f" ({each}), "
            f"{found['num_test']} test images in {found['test']}; about {found['median_side']} pixels",
            f"wrote {out}; look it over, then: ray-synth doctor --config {out} && "
            f"ray-synth run --config {out}",
            *([f"warning: this machine has no GPU, so {unfit}"] if unfit else []),
        ]
    )
