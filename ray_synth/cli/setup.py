"""`ray-synth init`: looks at a folder of images and writes a config that suits it."""

from __future__ import annotations

import io
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ray_synth.config import IN_DOMAIN, DataConfig, SourceConfig, parse_config
from ray_synth.data.dataset import Index, left_out, load_index, load_tests, read_index, select
from ray_synth.data.splits import find_splits
from ray_synth.errors import UserError, shortened


def write_config(
    images: Path, out: Path, *, test: Path | None = None, name: str | None = None
) -> dict[str, Any]:
    """Write `out` for an image folder: `images/CLASS/*.jpg`, or with train/ and test/ inside.

    Returns:
        What was found: class counts, sizes, where training and test images lie, what is left out.

    Raises:
        UserError: the folder is missing or empty, has no test images, `name` is none that a run may have,
            or `out` exists already.
    """
    images, out = images.expanduser(), out.expanduser()
    if out.exists() and out.stat().st_size:  # a full disk leaves empty ones
        raise UserError(f"{out} exists already; name another with --out")
    if not images.is_dir():
        raise UserError(f"no such folder: {images}")
    train, found_test, others = find_splits(images)
    test = test.expanduser() if test else found_test
    if test is None:
        raise UserError(
            f"{images} has no test images: put them in {images}/test/CLASS/ (and the others in "
            f"{images}/train/CLASS/), or name a folder with --test. What is gained can only be "
            "shown on real images that were not trained on."
        )
    index = load_index(_folder(train))
    data = DataConfig(train=_folder(train), test=_folder(test))
    tests = load_tests(data, index.class_names, 0)
    counts = index.counts()
    sizes = _sizes(index)
    side = int(np.median([min(size) for size in sizes])) if sizes else 224
    found: dict[str, Any] = {
        "train": str(train),
        "test": str(test),
        "counts": counts,
        "num_train": len(index),
        "num_test": len(tests[IN_DOMAIN]),
        "median_side": side,
        "left_out": left_out(index, tests),
    }
    if others:
        found["left_out"].append(f"not used: {shortened([f'{name}/' for name in others], 5)}")
    config = _config(name or run_name(images), found)
    parse_config(config, origin="--name" if name else "the config that init would write")
    header = (
        f"# Written by `ray-synth init` for {len(counts)} classes and {len(index)} training images "
        f"of about {side} pixels.\n# Run it with: ray-synth run --config {_in_shell(out)}\n"
    )
    _write(out, header + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return found


def _folder(path: Path) -> SourceConfig:
    return SourceConfig(format="imagefolder", path=str(path))


def run_name(images: Path) -> str:
    """A name that a run may have, from a folder's: `Bilder Ä (1)` is bilder-a-1."""
    text = unicodedata.normalize("NFKD", images.resolve().name.lower())
    plain = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9._]+", "-", plain).strip("-._")[:80] or "images"


def _in_shell(path: Path) -> str:
    """A path as a command takes it, in one line."""
    return " ".join(shlex.quote(str(path)).splitlines())


def _write(out: Path, text: str) -> None:
    """The file appears whole, or not at all: an empty one would be taken for a config."""
    begun = out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(text, encoding="utf-8")
        begun.replace(out)
    except OSError as error:
        begun.unlink(missing_ok=True)
        raise UserError(f"--out {out} cannot be written: {error}") from None


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
    return "\n".join(
        [
            f"{len(counts)} classes, {found['num_train']} training images in {found['train']}"
            f" ({counts[fewest]} of {fewest!r} to {counts[most]} of {most!r}), "
            f"{found['num_test']} test images in {found['test']}; about {found['median_side']} pixels",
            *(f"warning: {line}" for line in found["left_out"]),
            f"wrote {out}; look it over, then: ray-synth doctor --config {_in_shell(out)} && "
            f"ray-synth run --config {_in_shell(out)}",
        ]
    )
