"""Plain timm state dicts of a dual-BN model: with its main BNs, its auxiliary ones, or both in one."""

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
            states = layer.main.state_dict(), layer.aux.state_dict()
            for key, value in _blended(layer.main, *states, prefix, 0.5).items():
                exported[prefix + key] = value
    return exported


def blend(
    model: nn.Module, main: dict[str, Tensor], aux: dict[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """As `export_average`, of any weight and of exported state dicts.

    Args:
        model: a plain model that they fit, for its layers alone.
        main, aux: of one training, as `export_main` and `export_aux` give them.
        weight: of the auxiliary BNs' outputs: 0 is `main`, 1/2 the average, 1 `aux`.

    Raises:
        UserError: as `export_average`.
    """
    found = {key: value.clone() for key, value in main.items()}
    for name, layer in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        names = [*layer._parameters, *layer._buffers]
        own = [key for key in names if prefix + key in main]
        kept, other = ({key: state[prefix + key] for key in own} for state in (main, aux))
        # What is not a twin is the same in both.
        if own and any(not torch.equal(kept[key], other[key]) for key in own):
            for key, value in _blended(layer, kept, other, prefix, weight).items():
                found[prefix + key] = value
    return found


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


def _blended(
    norm: nn.Module, kept: dict[str, Tensor], other: dict[str, Tensor], prefix: str, weight: float
) -> dict[str, Tensor]:
    """The state of one norm that gives the weighted mean of both twins' outputs."""
    if not isinstance(norm, _BatchNorm):
        return {key: (1 - weight) * kept[key] + weight * other[key] for key in kept}
    if "running_var" not in kept:
        raise UserError(f"{prefix}: a BatchNorm without running statistics cannot be averaged")
    eps = norm.eps
    one, zero = torch.ones(()), torch.zeros(())
    scales, shifts = [], []
    for state in (kept, other):
        scale = state.get("weight", one).double() * (state["running_var"].double() + eps).rsqrt()
        scales.append(scale)
        shifts.append(state.get("bias", zero).double() - state["running_mean"].double() * scale)
    scale, shift = ((1 - weight) * a + weight * b for a, b in (scales, shifts))
    mean, var = kept["running_mean"].double(), kept["running_var"].double()
    if "weight" in kept:
        folded = {"weight": scale * (var + eps).sqrt(), "bias": shift + mean * scale}
    else:  # the statistics themselves must carry the map
        folded = {"running_var": scale**-2 - eps, "running_mean": -shift / scale}
    return {key: value.to(kept[key].dtype) for key, value in folded.items()}
