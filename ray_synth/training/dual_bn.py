"""Dual BatchNorm: real and synthetic rows of one batch, each normalised by their own BN layers.

In: any timm model and a batch of real rows followed by synthetic rows. Out: the same model with
an auxiliary twin beside every BN (`state_dicts.py` makes plain timm weights of it again).

The auxiliary BN is that of "Diversify, Don't Fine-Tune" (arXiv 2312.02253, section 3.3), after
AdvProp (arXiv 1911.09665, section 4.2). Unlike timm's `SplitBatchNorm2d`, which cuts a batch in
equal parts, rows are routed by a domain split carried beside the batch, so any ratio will do:

    model = convert_dual_bn(timm.create_model("resnet50"))
    with domain_split(model, num_real=96, num_synth=32):
        logits = model(torch.cat([real, synthetic]))

Distributed training:
- A layer that gets no row of a domain does not call that domain's BN, so a batch of one domain
  alone leaves the other BN's parameters without a gradient. Under DDP, either give every rank rows
  of both domains at every step, or set `find_unused_parameters=True`.
- SyncBatchNorm communicates at every call, so the ranks must agree, at each step, on which domains
  are present; how many rows each has may differ.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ray_synth.errors import UserError
from ray_synth.training.bn_kernels import is_plain, normalise_parts, normalise_rows

logger = logging.getLogger(__name__)

EvalBN = Literal["main", "aux", "average"]
EVAL_BNS: tuple[EvalBN, ...] = ("main", "aux", "average")


@dataclass
class DomainSplit:
    """Which rows of the current batch are real. One object, shared by all layers of a model.

    `num_real` and `num_synth` are None outside of `domain_split`; `eval_bn` then says which BN an
    evaluating layer uses.
    """

    num_real: int | None = None
    num_synth: int | None = None
    eval_bn: EvalBN = "main"


class DualBatchNorm(nn.Module):
    """A BatchNorm layer (`main`, for real rows) and its twin (`aux`, for synthetic rows).

    Args:
        norm: the layer to split, of any BatchNorm class. It becomes `main` itself, so that
            parameters already held elsewhere stay valid; `aux` starts as its copy.
        split: the model's domain split.

    The activation and drop of a timm `BatchNormAct2d` move here, behind both twins, where a later
    `nn.SyncBatchNorm.convert_sync_batchnorm` (which knows nothing of them) cannot lose them.
    """

    def __init__(self, norm: nn.Module, split: DomainSplit) -> None:
        super().__init__()
        self.drop = _take_child(norm, "drop")
        self.act = _take_child(norm, "act")
        self.main = norm
        self.aux = copy.deepcopy(norm)
        self.split = split
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, of shape (rows, channels, ...), by domain.

        Inside `domain_split`, the real rows come first. Outside, an evaluating layer uses the BN
        chosen by `use_bn`.

        Raises:
            UserError: when training outside of `domain_split`, or when the rows are not a multiple
                of the split's.
        """
        if self.split.num_real is not None:
            x = self._normalise_by_domain(x)
        elif self.training:
            raise UserError(
                "a dual-BN model in training mode was called outside of `domain_split`: wrap the "
                "forward in `with domain_split(model, num_real, num_synth):` (and the backward as "
                "well under gradient checkpointing), or call model.eval()"
            )
        elif self.split.eval_bn == "main":
            x = self.main(x)
        elif self.split.eval_bn == "aux":
            x = self.aux(x)
        else:
            x = (self.main(x) + self.aux(x)) / 2
        return self.act(self.drop(x))

    def _normalise_by_domain(self, x: Tensor) -> Tensor:
        num_real, num_synth = self.split.num_real, self.split.num_synth
        assert num_real is not None and num_synth is not None
        # Some models (LeViT) fold tokens into the batch axis: each image is then several rows.
        rows_per_image, rest = divmod(x.shape[0], num_real + num_synth)
        if rest or rows_per_image == 0:
            raise UserError(
                f"the domain split says {num_real} real + {num_synth} synthetic images, but a "
                f"BatchNorm layer got {x.shape[0]} rows: give `domain_split` the batch's own counts"
            )
        if num_synth == 0:
            return self.main(x)
        if num_real == 0:
            return self.aux(x)
        sizes = [num_real * rows_per_image, num_synth * rows_per_image]
        one_value = min(sizes) * x[0, 0].numel() == 1  # an error, which the layers raise
        if not one_value and is_plain(self.main) and is_plain(self.aux):
            normalise = normalise_rows if torch.compiler.is_compiling() else normalise_parts
            return normalise(x, sizes, self.main, self.aux)
        # split, not two slices: its backward is one cat, where slices would each fill a whole tensor.
        real, synth = x.split(sizes)
        return torch.cat([self.main(real), self.aux(synth)])


def convert_dual_bn(model: nn.Module, *, layer_norm: bool = False) -> nn.Module:
    """Give every BatchNorm layer of `model` an auxiliary twin; in place.

    With `layer_norm`, LayerNorm and RmsNorm layers get one as well: their statistics are of one image
    each, so what is split is the affine part. An option of ours, not of the paper.

    In eval mode the converted model computes what `model` did. BatchNorm layers that are already
    dual stay as they are; a model without BatchNorm is returned unchanged, with one warning.
    SyncBatchNorm conversion may come before or after. Build the optimizer and any EMA after.

    Returns:
        The model (a `DualBatchNorm` when `model` is itself a BatchNorm layer).
    """
    already = [m for m in model.modules() if isinstance(m, DualBatchNorm)]
    split = already[0].split if already else DomainSplit()
    inside_dual = {twin for dual in already for twin in (dual.main, dual.aux)}
    twins: dict[nn.Module, DualBatchNorm] = {}  # a layer that is used twice is split once

    kinds: Any = (_BatchNorm, *_layer_norms()) if layer_norm else _BatchNorm

    def dual(norm: nn.Module) -> DualBatchNorm:
        if norm not in twins:
            twins[norm] = DualBatchNorm(norm, split)
        return twins[norm]

    if isinstance(model, kinds):
        return dual(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and isinstance(child, kinds) and child not in inside_dual:
                setattr(parent, name, dual(child))
    if not twins and not already:
        logger.warning(
            "%s has no BatchNorm layer: there is nothing to split, real and synthetic images are "
            "normalised together (training.dual_layer_norm splits LayerNorm layers)",
            type(model).__name__,
        )
    return model


def check_dual_bn(model: nn.Module) -> None:
    """Raises UserError where the trained twins could not be averaged, as they are after training."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise UserError(
                f"training.dual_bn: BatchNorm layer {name} keeps no running statistics, so its twins "
                "cannot be averaged; set dual_bn to false, or take another model"
            )


@contextmanager
def domain_split(model: nn.Module, num_real: int, num_synth: int) -> Iterator[None]:
    """Route the first `num_real` rows of the batch to the main BNs, the other `num_synth` to aux.

    Holds in training and in eval mode (so frozen BNs are routed too). Does nothing for a model
    without dual BN. Under gradient checkpointing, the backward belongs inside the block as well,
    for it runs the forward again.

    Raises:
        UserError: when a count is negative or both are 0.
    """
    if min(num_real, num_synth) < 0 or num_real + num_synth == 0:
        raise UserError(
            f"a domain split needs counts >= 0 that are not both 0, got num_real={num_real}, "
            f"num_synth={num_synth}"
        )
    splits = _splits(model)
    before = [(split.num_real, split.num_synth) for split in splits]
    for split in splits:
        split.num_real, split.num_synth = num_real, num_synth
    try:
        yield
    finally:
        for split, (old_real, old_synth) in zip(splits, before, strict=True):
            split.num_real, split.num_synth = old_real, old_synth


@contextmanager
def use_bn(model: nn.Module, bn: EvalBN) -> Iterator[None]:
    """Evaluate with the `main` BNs (the default), the `aux` ones, or the `average` of both.

    `average` takes the mean of both outputs at every layer. Has no effect inside `domain_split`.

    Raises:
        UserError: when `bn` is none of the three.
    """
    if bn not in EVAL_BNS:
        raise UserError(f"unknown BN {bn!r}: choose one of {', '.join(EVAL_BNS)}")
    splits = _splits(model)
    before = [split.eval_bn for split in splits]
    for split in splits:
        split.eval_bn = bn
    try:
        yield
    finally:
        for split, old in zip(splits, before, strict=True):
            split.eval_bn = old


def has_dual_bn(model: nn.Module) -> bool:
    """Whether any layer of `model` is a `DualBatchNorm`."""
    return any(isinstance(module, DualBatchNorm) for module in model.modules())


def _take_child(norm: nn.Module, name: str) -> nn.Module:
    """Move the child module `name` (`act` or `drop`) out of `norm`, leaving an identity."""
    child = norm._modules.get(name)
    if child is None:
        return nn.Identity()
    norm._modules[name] = nn.Identity()
    return child


def _splits(model: nn.Module) -> list[DomainSplit]:
    """The distinct domain splits of the layers of `model`: one, or none without dual BN."""
    splits = {id(m.split): m.split for m in model.modules() if isinstance(m, DualBatchNorm)}
    return list(splits.values())


def _layer_norms() -> tuple[type[nn.Module], ...]:
    """The norm layers of one image that timm's models are built from."""
    from timm.layers import RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d

    return (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d)
