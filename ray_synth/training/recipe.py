"""The training recipe, thin over timm: model, optimizer, schedule, average, loss.

In: names and numbers from the config. Out: the objects a training loop needs. The same recipe serves
the matched baseline and the mixed run.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_synth.config import OptimizerConfig, TrainingConfig
from ray_synth.errors import UserError, did_you_mean, shortened
from ray_synth.storage.classifiers import create_classifier

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler
    from timm.utils import ModelEmaV3


def build_model(
    name: str,
    *,
    num_classes: int,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    keep_classifier: bool = False,
) -> nn.Module:
    """A timm model by name.

    Args:
        name: a timm model (`resnet50`, `resnet50.a1_in1k`), or with a prefix of timm's, such as
            `hf-hub:` or `local-dir:`.
        num_classes: size of the classifier.
        pretrained: fetch timm's weights.
        checkpoint: a safetensors file to start from; a classifier of another size is left out.
        model_kwargs: further arguments of the timm model.
        keep_classifier: refuse a checkpoint whose classifier is of another size.

    Raises:
        UserError: as `create_classifier`, or for a checkpoint that does not fit.
    """
    model = create_classifier(
        name, num_classes=num_classes, pretrained=pretrained, model_kwargs=model_kwargs
    )
    if checkpoint is not None:
        _load_checkpoint(model, Path(checkpoint), keep_classifier)
    return model


def check_pretrained(name: str) -> None:
    """Raises UserError where timm has no weights of a model."""
    import timm

    if ":" not in name and not timm.is_model_pretrained(name):
        raise UserError(
            f"training.pretrained: timm has no weights of {name!r}; set it to false, or take one of "
            "those that `timm.list_pretrained()` names"
        )


def check_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Compare a checkpoint's names and shapes with a model's; no weight is read.

    Raises:
        UserError: as `build_model` does for it.
    """
    from safetensors import safe_open

    path = _safetensors_file(Path(path))
    with _readable(path), safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    _require_fit(model, path, shapes, keep_classifier=False)


def data_config(model: nn.Module) -> dict[str, Any]:
    """How the model's images are normalised and resized: timm's `mean`, `std`, `interpolation`, ...

    Its pretrained weights were trained so; where there are none, it is as good as any other.
    """
    from timm.data import resolve_model_data_config

    found = resolve_model_data_config(model)
    known = found["interpolation"] in ("bilinear", "bicubic")
    return {**found, "interpolation": found["interpolation"] if known else "bilinear"}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """A timm optimizer by name (`sgd`, `adamw`, `lamb`, ...).

    Biases and norm layers get no weight decay. With `layer_decay`, each layer has its own rate; the
    twins of a dual BN have that of their layer.

    Raises:
        UserError: for an unknown name, with the nearest ones, or arguments that it refuses.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    known = [str(known_name) for known_name in list_optimizers()]
    if config.name.lower() not in known:
        raise UserError(f"unknown optimizer {config.name!r}: {did_you_mean(config.name, known)}")
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **{"momentum": 0.9, **config.kwargs},
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"optimizer {config.name!r} refuses training.optimizer.kwargs: {error}"
        ) from error


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, *, steps: int
) -> "Scheduler":
    """A timm schedule over `steps` updates, after a linear warm-up that is part of them.

    After update `step` (counted from 1) call `schedule.step_update(step)`. The rate is a function
    of the step alone, so resuming needs nothing else.

    Raises:
        UserError: for `schedule_kwargs` that timm refuses.
    """
    from timm.scheduler import create_scheduler_v2

    warmup = min(int(steps * config.warmup_fraction), steps - 1)
    # "constant" never decays, and a schedule that decays to nothing needs at least one step.
    options = {"decay_epochs": max(1, steps // 3), **config.schedule_kwargs}
    if config.schedule == "poly":
        options.setdefault("decay_rate", 1.0)
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=config.schedule,
            num_epochs=steps - warmup,
            min_lr=config.lr * config.min_lr_fraction,
            # Not 0, which would waste the first update.
            warmup_lr=config.lr / (warmup + 1),
            warmup_epochs=warmup,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=1,
            **options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"training.optimizer.schedule_kwargs: {error}") from error
    assert schedule is not None
    return schedule


def clip_gradients(model: nn.Module, config: OptimizerConfig) -> None:
    """Clip by the global norm; nothing where it is off."""
    if config.clip_grad_norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)


def lambda_at(step: int, steps: int, start: float, end: float) -> float:
    """Lambda, linear from `start` at the first step to `end` at the last of `steps`."""
    return start + (end - start) * step / max(1, steps - 1)


def balanced_weights(counts: np.ndarray, balance: float) -> np.ndarray:
    """Probability of each class at a draw: by its images (balance 0) to equal (1), and between.

    Args:
        counts: (classes,) images of each class; classes without any get 0.
        balance: p_c is proportional to count_c^(1 - balance); 0.5 is square-root sampling.
    """
    counts = np.asarray(counts, dtype=np.float64)
    weights = np.where(counts > 0, np.maximum(counts, 1) ** (1 - balance), 0.0)
    return weights / weights.sum()


def build_ema(model: nn.Module, decay: float) -> "ModelEmaV3":
    """timm's exponential moving average, warmed up; `ema.update(model, step)` after each update."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def build_loss(config: TrainingConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of some rows: (n, classes) logits, and (n,) class indices or (n, classes) probabilities.

    Mixup and CutMix smooth the labels themselves; the loss then does not do it again.
    """
    smoothing = 0.0 if config.mixup or config.cutmix else config.label_smoothing
    if config.loss == "binary_cross_entropy":
        from timm.loss import BinaryCrossEntropy

        return BinaryCrossEntropy(smoothing, target_threshold=config.target_threshold)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def mixed_loss(
    logits: Tensor,
    targets: Tensor,
    num_real: int,
    lambda_synth: float,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> tuple[Tensor, Tensor, Tensor]:
    """L = L_real + lambda * L_synth (arXiv 2312.02253, section 3.3), each a mean over its rows.

    Args:
        logits: (batch, classes), real rows first.
        targets: (batch,) class indices, or (batch, classes) probabilities.
        num_real: how many of the rows are real; the loss of an absent domain is 0.
        loss: of one domain's rows, a mean.

    Returns:
        The total, and the two domains' losses, unweighted.
    """
    if not 0 <= num_real <= len(logits):
        raise ValueError(f"num_real must be 0 to {len(logits)}, the batch size, got {num_real}")

    def mean_loss(rows: slice) -> Tensor:
        if logits[rows].numel() == 0:
            return logits.new_zeros(())
        return loss(logits[rows], targets[rows])

    loss_real, loss_synth = mean_loss(slice(num_real)), mean_loss(slice(num_real, None))
    return loss_real + lambda_synth * loss_synth, loss_real, loss_synth


def _load_checkpoint(model: nn.Module, path: Path, keep_classifier: bool) -> None:
    from safetensors.torch import load_file

    path = _safetensors_file(path)
    with _readable(path):
        weights = load_file(path)
    own = model.state_dict()
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    for key in _require_fit(model, path, shapes, keep_classifier):
        weights[key] = own[key]
    model.load_state_dict(weights, strict=True)


def _safetensors_file(path: Path) -> Path:
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(f"checkpoint {path} must be an existing .safetensors file")
    return path


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise UserError(f"checkpoint {path} is not a complete safetensors file: {error}") from None


def _require_fit(
    model: nn.Module, path: Path, shapes: dict[str, tuple[int, ...]], keep_classifier: bool
) -> list[str]:
    """The weights of a classifier of another size, which are left out. Raises UserError for others."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    classifier = getattr(model, "default_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    left_out = [
        key
        for key in shapes
        if key.startswith(tuple(f"{head}." for head in heads))
        and not keep_classifier
        and key in own
        and own[key] != shapes[key]
    ]
    wrong = [
        *(f"{key} is missing" for key in own.keys() - shapes.keys()),
        *(f"{key} is not in the model" for key in shapes.keys() - own.keys()),
        *(
            f"{key} is {shapes[key]}, not {own[key]}"
            for key in (own.keys() & shapes.keys()) - set(left_out)
            if own[key] != shapes[key]
        ),
    ]
    if wrong:
        raise UserError(
            f"checkpoint {path} does not fit a {type(model).__name__}, it is of another architecture: "
            f"{shortened(sorted(wrong), 3, joint='; ')}; give "
            "training.model the name of the model that it was saved from"
        )
    return left_out
