"""The model and all that changes with it: optimizer, schedule, average, scaler; one step of them.

Every random number of a step (dropout, stochastic depth) is a function of (seed, step, rank), so that a
step taken again after a restart is the same step.
"""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ray_synth.device import pick_dtype
from ray_synth.training import recipe
from ray_synth.training.augmentation import Mixing, train_transform
from ray_synth.training.dual_bn import convert_dual_bn, domain_split
from ray_synth.training.feed import derived_seed
from ray_synth.training.job import STATE_FILE, TrainJob

if TYPE_CHECKING:
    from ray_synth.storage.folder import Folder
    from ray_synth.training.prefetch import Prepared

log = logging.getLogger("ray_synth")
MODEL, AUGMENTATION = 1, 2  # what a seed is for


class Learner:
    """One worker's model in training.

    Args:
        rank, world_size: of this worker; with more than one, gradients are averaged by DDP.
    """

    def __init__(self, job: TrainJob, device: torch.device, rank: int, world_size: int) -> None:
        import ray.train.torch

        config = job.config
        self.job, self.config, self.device = job, config, device
        self.rank, self.world_size = rank, world_size
        if device.type == "cpu":
            torch.set_num_threads(job.num_threads or os.cpu_count() or 1)
        elif device.type == "cuda":  # as timm's own training: all batches have one shape
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        torch.manual_seed(job.seed)
        self.model = _build(job, device, world_size)
        self.ema = recipe.build_ema(self.model, config.ema_decay) if config.ema_decay else None
        self.optimizer = recipe.build_optimizer(self.model, config.optimizer)
        self.schedule = recipe.build_schedule(self.optimizer, config.optimizer, steps=job.steps)
        self.dtype = pick_dtype(config.dtype, device.type)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.data_config = recipe.data_config(self.model)
        self.transform = train_transform(
            config.image_size,
            config.augment,
            mean=self.data_config["mean"],
            std=self.data_config["std"],
            interpolation=self.data_config["interpolation"],
        )
        self.mixing = Mixing.of(config, len(job.class_names))
        self.loss = recipe.build_loss(config)
        self._wrapped: Any = ray.train.torch.prepare_model(
            self.model,
            move_to_device=False,
            parallel_strategy_kwargs={"gradient_as_bucket_view": True},  # of DDP: one copy fewer
        )
        self._forward: Any = torch.compile(self._wrapped) if config.compile else self._wrapped
        self.model.train()

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load what `save` wrote; the history it was given."""
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        return state["history"]

    def save(self, folder: Path, history: dict[str, Any]) -> None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save({**state, "history": history}, folder / STATE_FILE)

    def leave(self, folder: Folder, history: dict[str, Any]) -> None:
        """`save` for the next part of the training, in the folder of this one's models."""
        with tempfile.TemporaryDirectory() as local:
            self.save(Path(local), history)
            folder.write_bytes(STATE_FILE, (Path(local) / STATE_FILE).read_bytes())

    def take(self, folder: Folder) -> dict[str, Any]:
        """`restore` of what `leave` wrote."""
        with tempfile.TemporaryDirectory() as local:
            (Path(local) / STATE_FILE).write_bytes(folder.read_bytes(STATE_FILE))
            return self.restore(Path(local))

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "model": self.model, "optimizer": self.optimizer, "scaler": self.scaler,
        }  # fmt: skip
        return {**parts, "ema": self.ema} if self.ema else parts

    def finish(self, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The prefetcher's last half: augment and normalise, and mix within each domain."""
        seed = derived_seed(self.job.seed, number, self.rank, AUGMENTATION)
        x = self.transform.batch(images, seed)
        targets = labels
        if self.mixing is not None:
            x, targets = self.mixing(x, labels, self.config.num_real, seed)
        return x.contiguous(memory_format=torch.channels_last), targets

    def weight(self, step: int) -> float:
        """Lambda, the weight of the synthetic loss at this step."""
        start, end = self.config.lambda_synth, self.config.lambda_end
        return recipe.lambda_at(step, self.job.steps, start, start if end is None else end)

    def step(self, step: int, batches: list[Prepared]) -> tuple[Tensor, Tensor]:
        """One optimizer step over `accumulate_steps` batches.

        Returns:
            The total loss, and (6,) float sums: loss, hits and images of the real rows, then of the
            synthetic ones.
        """
        config = self.config
        torch.manual_seed(derived_seed(self.job.seed, step, self.rank, MODEL))
        weight = self.weight(step)
        sums = torch.zeros(6, device=self.device)
        total = torch.zeros((), device=self.device)
        for at, batch in enumerate(batches):
            # DDP averages gradients at the last of the batches only.
            quiet = at + 1 < len(batches) and hasattr(self._wrapped, "no_sync")
            with self._wrapped.no_sync() if quiet else nullcontext():
                loss, part = self._backward(batch, weight, len(batches))
            total += loss
            sums += part
        self.scaler.unscale_(self.optimizer)
        recipe.clip_gradients(self.model, config.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step_update(step + 1)
        if self.ema:
            self.ema.update(self.model, step)
        return total, sums

    def _backward(self, batch: Prepared, weight: float, parts: int) -> tuple[Tensor, Tensor]:
        num_real, num_synth = self.config.num_real, self.job.num_synth
        half = self.dtype is not torch.float32
        with domain_split(self.model, num_real, num_synth):
            with torch.autocast(self.device.type, self.dtype, enabled=half):
                logits = self._forward(batch.images)
            loss, loss_real, loss_synth = recipe.mixed_loss(
                logits.float(), batch.targets, num_real, weight, self.loss
            )
            self.scaler.scale(loss / parts).backward()
        with torch.no_grad():
            hits = (logits.argmax(1) == batch.labels).float()
            sums = torch.stack(
                [
                    loss_real * num_real,
                    hits[:num_real].sum(),
                    hits.new_tensor(num_real),
                    loss_synth * num_synth,
                    hits[num_real:].sum(),
                    hits.new_tensor(num_synth),
                ]
            )
        return loss.detach() / parts, sums


def _build(job: TrainJob, device: torch.device, world_size: int) -> nn.Module:
    """The classifier of the config on its device, converted as it says."""
    config = job.config
    model = recipe.build_model(
        config.model,
        num_classes=len(job.class_names),
        pretrained=config.pretrained,
        checkpoint=config.checkpoint,
        model_kwargs=config.model_kwargs,
    )
    if job.mixed and config.dual_bn:
        convert_dual_bn(model, layer_norm=config.dual_layer_norm)
    if config.sync_bn and world_size > 1:
        if device.type == "cuda":
            from timm.layers import convert_sync_batchnorm

            model = convert_sync_batchnorm(model)  # torch's would drop timm's activations
        else:
            log.warning("training.sync_bn needs GPUs: each worker keeps its own BN statistics")
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
