"""Trained models as files: plain timm state dicts, each with a card that says how it was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_synth.training.job import TrainJob

if TYPE_CHECKING:
    from ray_synth.training.augmentation import ImageTransform
    from ray_synth.training.learner import Learner


def export_models(
    job: TrainJob, learner: Learner, history: dict[str, Any], synthetic: Any = None
) -> None:
    """Write `models/<arm>.<bn>.safetensors`, one per choice of BN, and `models/<arm>.json`.

    Into the run's folder, or the one that the job publishes to.

    Args:
        synthetic: the synthetic feed; a live one says how many images came and how many were drawn
            again.
    """
    from safetensors.torch import save

    from ray_synth.training.dual_bn import has_dual_bn
    from ray_synth.training.state_dicts import export_aux, export_average, export_main

    folder = job.publish or job.folder
    model = learner.ema.module if learner.ema else learner.model
    choices = {"main": export_main}
    if has_dual_bn(model):
        choices |= {"aux": export_aux, "average": export_average}
    for bn, export in choices.items():
        weights = {key: value.detach().cpu().contiguous() for key, value in export(model).items()}
        folder.write_bytes(f"models/{job.arm}.{bn}.safetensors", save(weights, {"format": "pt"}))
    config, seconds = job.config, history["seconds"]
    card = {
        "arm": job.arm,
        "model": config.model,
        "model_kwargs": config.model_kwargs,
        "class_names": list(job.class_names),
        "image_size": config.eval_image_size or config.image_size,
        **{key: learner.data_config[key] for key in ("mean", "std", "interpolation")},
        # Where training cropped at random, the test takes the centre that the model's authors took.
        "crop_pct": learner.data_config["crop_pct"] if learner.transform.random else 1.0,
        "bns": list(choices),
        "steps": job.end,
        "num_synthetic": job.num_synthetic,
        "real_images_seen": history["real_images_seen"],
        "seconds": seconds,
        "stall_fraction": history["stalled"] / seconds if seconds else 0.0,
        "corrupt": history["corrupt"],
        "curve": history["curve"],
    }
    if hasattr(synthetic, "replayed"):
        card["synthetic_arrived"] = synthetic.arrived
        card["synthetic_replayed"] = synthetic.replayed
    folder.write_json(f"models/{job.arm}.json", card)


def card_transform(card: dict[str, Any]) -> ImageTransform:
    """How a test prepares images for the model of a card."""
    from ray_synth.training.augmentation import eval_transform

    names = ("mean", "std", "interpolation", "crop_pct")
    return eval_transform(card["image_size"], **{name: card[name] for name in names})
