"""Plain timm state dicts of a dual-BN model: with its main BNs, its auxiliary ones, or their average."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ray_synth.errors import UserError
from ray_synth.training.dual_bn import DualBatchNorm


def export_main(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model with the main BNs, under the plain model's own keys.

    Loads with `strict=True` and gives identical outputs. Like `state_dict`, it shares memory with
    the model. Pass the model itself, not its DDP or `torch.compile` wrapper.
    """
    return _export(model, keep="main", leave="aux")


def export_aux(model: nn.Module) -> dict[str, Tensor]:
    """As `export_main`, with the auxiliary BNs."""
    return _export(model, keep="aux", leave="main")


def export_average(model: nn.Module) -> dict[str, Tensor]:
    """As `export_main`, with BNs that give the mean of both twins' outputs in eval mode.

    At test time each twin is an affine map per channel, and so is their mean: it is folded into one
    plain BN. Equal to `use_bn(model, "average")` but for rounding.

    Raises:
        UserError: for BNs without running statistics, which have no map of their own.
    """
    exported = {key: value.clone() for key, value in export_main(model).items()}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, DualBatchNorm):
            prefix = f"{name}." if name else ""
            for key, value in _average(layer, prefix).items():
                exported[prefix + key] = value
    return exported


def _export(model: nn.Module, *, keep: str, leave: str) -> dict[str, Tensor]:
    # remove_duplicate=False: a layer used twice has its keys under both of its names.
    layers = [
        f"{name}." if name else ""
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, DualBatchNorm)
    ]
    renamed = {f"{layer}{keep}.": layer for layer in layers}
    dropped = tuple(f"{layer}{leave}." for layer in layers)
    exported = {}
    for key, value in model.state_dict().items():
        if key.startswith(dropped):
            continue
        stem, dot, leaf = key.rpartition(".")
        exported[renamed.get(stem + dot, stem + dot) + leaf] = value
    return exported


def _average(layer: DualBatchNorm, prefix: str) -> dict[str, Tensor]:
    """The state of one norm that gives the mean of both twins."""
    kept, other = layer.main.state_dict(), layer.aux.state_dict()
    if not isinstance(layer.main, _BatchNorm):
        return {key: (kept[key] + other[key]) / 2 for key in kept}
    if "running_var" not in kept:
        raise UserError(f"{prefix}: a BatchNorm without running statistics cannot be averaged")
    eps = layer.main.eps
    one, zero = torch.ones(()), torch.zeros(())
    scales, shifts = [], []
    for state in (kept, other):
        scale = state.get("weight", one).double() * (state["running_var"].double() + eps).rsqrt()
        scales.append(scale)
        shifts.append(state.get("bias", zero).double() - state["running_mean"].double() * scale)
    scale, shift = (scales[0] + scales[1]) / 2, (shifts[0] + shifts[1]) / 2
    mean, var = kept["running_mean"].double(), kept["running_var"].double()
    if "weight" in kept:
        folded = {"weight": scale * (var + eps).sqrt(), "bias": shift + mean * scale}
    else:  # the statistics themselves must carry the map
        folded = {"running_var": scale**-2 - eps, "running_mean": -shift / scale}
    return {key: value.to(kept[key].dtype) for key, value in folded.items()}
