"""What a tuning is told, and what the adapter then says of itself: of which images, by which settings,
with which loss.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ray_synth.config import GenerationConfig, TuningConfig
from ray_synth.data.dataset import Index
from ray_synth.errors import shortened
from ray_synth.generators.protocol import digest_settings
from ray_synth.generators.settings import family_of, filled, fingerprint
from ray_synth.storage.folder import Folder

LOSSES = 200  # means that the record keeps
SHOWN = 10  # prompts in the card


@dataclass(frozen=True)
class TuningJob:
    """What a tuning is told.

    Attributes:
        images: training images alone.
        captions: the prompt of each class index.
        folder: where the adapter is left.
        seed: of the LoRA's first weights, the order of images, noise and timesteps.
        board: the progress board's handle; None: nobody watches.
    """

    generation: GenerationConfig
    tuning: TuningConfig
    images: Index
    captions: tuple[str, ...]
    folder: Folder
    seed: int
    max_pixels: int
    board: Any = None

    @cached_property
    def identity(self) -> str:
        """Digest of all that decides the result."""
        tuning = self.tuning.model_dump(exclude={"checkpoint_every"})
        generator = fingerprint(self.generation)
        images = images_digest(self.images)
        return digest_settings([generator, tuning, images, list(self.captions), self.seed])


def images_digest(index: Index) -> str:
    """A digest of which images these are, and of their classes."""
    digest = hashlib.sha256()
    for at in np.lexsort((index.row, index.shard)).tolist():
        digest.update(f"{index.image_id(at)}\t{index.label[at]}\n".encode())
    return digest.hexdigest()[:16]


def tuning_record(job: TuningJob, losses: list[float], bad: set[str]) -> dict[str, Any]:
    """`card.json`: all that the card says, for programs."""
    config, index = filled(job.generation), job.images
    mean_of = max(1, -(-len(losses) // LOSSES))
    return {
        "identity": job.identity,
        "model": config.model,
        "revision": config.revision,
        "family": family_of(config).name,
        "adapters": [item.path for item in config.adapters],
        "size": [config.width, config.height],
        "tuning": job.tuning.model_dump(exclude={"checkpoint_every"}),
        "seed": job.seed,
        "images": {
            "path": sorted({str(s.source.path or s.source.format) for s in index.shards}),
            "count": len(index),
            "per_class": index.counts(),
            "digest": images_digest(index),
            "set_aside": sorted(bad),
        },
        "captions": dict(zip(index.class_names, job.captions, strict=True)),
        "loss": {
            "mean_of_steps": mean_of,
            "values": [
                round(float(np.mean(losses[at : at + mean_of])), 6)
                for at in range(0, len(losses), mean_of)
            ],
        },
    }


def tuning_card(record: dict[str, Any]) -> str:
    """The same as README.md, for people."""
    images, tuning, losses = record["images"], record["tuning"], record["loss"]["values"]
    counts = list(images["per_class"].values())
    captions = [f"`{text.replace('`', ' ')}`" for text in record["captions"].values()]
    width, height = record["size"]
    model = record["model"] + (f" at {record['revision']}" if record["revision"] else "")
    lines = [
        "# A LoRA tuned on real images",
        f"Of {model} ({record['family']}), by ray-synth's `tune`: DreamBooth-LoRA on the attention "
        "layers of the denoiser. Generate with it: `generation.adapters: [this folder]`.",
        f"- Images: {images['count']:,} training images of {len(counts)} classes ({min(counts)} to "
        f"{max(counts)} each) from {', '.join(images['path'])}; digest {images['digest']}; "
        f"{len(images['set_aside'])} could not be decoded. Images held out for validation and test "
        "images were not opened.",
        f"- Settings: {tuning['steps']} steps of {tuning['batch_size']} images at {width} x {height}, "
        f"rank {tuning['rank']}, learning rate {tuning['learning_rate']:g}, seed {record['seed']}.",
        f"- Prompts: {shortened(captions, SHOWN, what='classes')}.",
        f"- Loss: {losses[0]:.4f} over the first steps, {losses[-1]:.4f} over the last "
        f"(means of {record['loss']['mean_of_steps']}); `card.json` has all.",
        "It has learnt its training images, and may draw one of them: hand it on where you may hand "
        "these on, and within the licence of the model beneath.",
    ]
    if record["adapters"]:
        lines.insert(3, f"- On top of: {', '.join(record['adapters'])}; name these before it.")
    return "\n\n".join([*lines[:2], "\n".join(lines[2:-1]), lines[-1]]) + "\n"
