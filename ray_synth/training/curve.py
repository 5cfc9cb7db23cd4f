"""The curve of a training: its points, and the watch for losses that are not finite."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ray_synth.errors import shortened
from ray_synth.training.job import TrainJob


def curve_point(sums: Tensor, weight: float, world_size: int) -> dict[str, float]:
    """A point of the curve: means over the step's images of all workers, exact for any split."""
    if world_size > 1:
        dist.all_reduce(sums)
    loss_real, hits_real, num_real, loss_synth, hits_synth, num_synth = sums.double().tolist()
    point = {
        "loss": loss_real / num_real,
        "loss_real": loss_real / num_real,
        "train_top1_real": hits_real / num_real,
    }
    if num_synth:
        point["loss_synth"] = loss_synth / num_synth
        point["train_top1_synth"] = hits_synth / num_synth
        point["loss"] += weight * point["loss_synth"]
    return point


class LossWatch:
    """The losses since the last look, on their device, and which images they were of.

    Looking waits for the device, so it is done where the loop waits for it anyhow.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, list[str]]] = []

    def add(self, step: int, loss: Tensor, names: list[str]) -> None:
        self.seen.append((step, loss, names))

    def first_bad(self, world_size: int = 1) -> tuple[int, list[str]] | None:
        """The first step whose loss was not finite on some rank, and that batch's image ids.

        All ranks must call it at the same step; they all get the same answer.
        """
        finite = torch.stack([loss for _, loss, _ in self.seen]).isfinite().tolist()
        mine = next(
            (
                (step, names)
                for (step, _, names), ok in zip(self.seen, finite, strict=True)
                if not ok
            ),
            None,
        )
        self.seen.clear()
        if world_size == 1:
            return mine
        found: list[Any] = [None] * world_size
        dist.all_gather_object(found, mine)
        bad = [item for item in found if item is not None]
        if not bad:
            return None
        first = min(step for step, _ in bad)
        return first, [name for step, names in bad if step == first for name in names]


def diverged(job: TrainJob, kept: int, step: int, names: list[str]) -> str:
    """Why training stopped: the loss of `step`; `kept` is the step of the last checkpoint, or 0."""
    rest = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint was written yet"
    return (
        f"training of {job.arm} stopped: the loss of step {step + 1} is not a number, or infinite "
        f"(images {shortened(names, 8)}); {rest}. Lower training.optimizer.lr, clip gradients "
        "(training.optimizer.clip_grad_norm), or train in float32 (training.dtype)"
    )
