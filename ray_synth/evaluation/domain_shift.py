"""How far synthetic images are from real ones: by features, and by layer of a network. Pure; no Ray.

Features of both go in, (images, dim) of one model; or a network with BatchNorm layers and batches of
both. Plain numbers come out, all computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ray_synth.errors import UserError
from ray_synth.evaluation.features import Rows, checked_pair

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK = 2048  # rows: blocks of kernel values are 32 MB of float64

Statistics = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]  # layer: mean, variance
Moments: TypeAlias = "tuple[int, Tensor, Tensor]"  # values per channel, mean, variance


@dataclass(frozen=True)
class LayerShift:
    """How far one layer's inputs are apart, channel by channel, as if each were a Gaussian.

    A channel's real mean and variance are m and v, the synthetic ones m' and v'; each variance has
    `eps` added, as in a BatchNorm layer.

    Attributes:
        layer: its name in the model.
        channels: how many it has.
        mean: root mean square over channels of (m' - m) / sqrt(v), in real standard deviations: how far
            activations have moved, the offset that a BatchNorm with real statistics leaves. Colour
            and light show in the first layers, what is depicted in the last.
        spread: root mean square over channels of log(v' / v) / 2, how far the ratio of standard
            deviations is from 1, in nats (0.69 is twice or half): images too smooth, noisy or alike.
        divergence: the mean over channels of (KL(real, synthetic) + KL(synthetic, real)) / 2 of the
            Gaussians, in nats: both at once, and the same when the two are swapped. A channel that is
            all but constant on one side can dominate it.
    """

    layer: str
    channels: int
    mean: float
    spread: float
    divergence: float


def frechet_distance(real: Rows, synthetic: Rows) -> float:
    """The squared Fréchet distance of Gaussians fitted to two sets of features; FID is this.

    |m - m'|² + tr(S + S' - 2 (S S')^½) with the unbiased covariances S (Heusel et al., "GANs Trained
    by a Two Time-Scale Update Rule", NeurIPS 2017, arXiv 1706.08500, equation 6). The eigenvalues of
    S S' are those of the symmetric product S^½ S' S^½. Their roots are the singular values of R R'ᵀ,
    where S = Rᵀ R, which is how they are computed: with neither a matrix root nor the loss of half
    the digits that squares bring, so a covariance without full rank (fewer images than dim) does no
    harm.

    It is biased upwards, the more so the fewer the images and the larger dim: compare it at equal
    counts only, and against that of two halves of the real images.

    Args:
        real: (n, dim) float, n >= 2, as the model gives them.
        synthetic: (m, dim) float, m >= 2.

    Returns:
        0 or more, in squared units of the features.

    Raises:
        ValueError: for fewer than 2 rows, NaN or infinity, and sets of different dim.
    """
    left, right = checked_pair(real, synthetic)
    gap = left.mean(axis=0) - right.mean(axis=0)
    root, other = _covariance_root(left), _covariance_root(right)
    shared = np.linalg.svd(root @ other.T, compute_uv=False).sum()
    variances = np.vdot(root, root) + np.vdot(other, other)
    return max(0.0, float(gap @ gap + variances - 2 * shared))


def cmmd(
    real: Rows,
    synthetic: Rows,
    *,
    bandwidth: float = 10.0,
    biased: bool = False,
) -> float:
    """CMMD: the squared maximum mean discrepancy of CLIP embeddings, with a Gaussian kernel,
    times 1000.

    k(x, y) = exp(-|x - y|² / (2 bandwidth²)) (Jayasumana et al., "Rethinking FID: Towards a Better
    Evaluation Metric for Image Generation", CVPR 2024, arXiv 2401.09603). Rows are scaled to length 1,
    and the kernel is computed in blocks of 2,048 x 2,048.

    The estimator is the unbiased one (Gretton et al., JMLR 13, 2012, equation 3): 0 in the mean for
    two draws of the same images, whatever their number, hence at times below 0. With `biased` it is
    that of the authors' published code (equation 5 there, never below 0), for comparison with published
    values; it is larger by 1000 * (1 - k) over the count, for each set's mean k.

    Args:
        real: (n, dim) float embeddings, n >= 2.
        synthetic: (m, dim) float embeddings, m >= 2.
        bandwidth: sigma, above 0.

    Raises:
        ValueError: see `frechet_distance`; also for rows of length 0 and a bandwidth of 0 or less.
    """
    if bandwidth <= 0:
        raise ValueError(f"the bandwidth is {bandwidth}, but must be above 0")
    left, right = checked_pair(real, synthetic, unit=True)
    n, m, off = len(left), len(right), 0 if biased else 1
    # 1 - k throughout: k itself is nearly 1, and its digits would cancel. A row and itself add 0.
    across = _kernel_gaps(left, right, bandwidth) / (n * m)
    within = _kernel_gaps(left, left, bandwidth) / (n * (n - off))
    within += _kernel_gaps(right, right, bandwidth) / (m * (m - off))
    return 1000 * (2 * across - within)


def probe_accuracy(real: Rows, synthetic: Rows, *, seed: int, folds: int = 5) -> float:
    """How well a linear probe tells real from synthetic features, in percent.

    The balanced accuracy of a logistic regression on images that it was not fitted to: 50 where the
    two cannot be told apart (by a linear rule, with so many images), 100 where always. Features are
    standardised by the other folds, which are stratified, and both sides weigh the same whatever
    their counts; as a classifier two-sample test (Lopez-Paz and Oquab, ICLR 2017, arXiv 1610.06545).
    Chance alone moves it by about 50 / sqrt(images). It grows with the number of images; a copy of
    an image in another fold helps it.

    Args:
        real: (n, dim) float, n >= folds.
        synthetic: (m, dim) float, m >= folds.
        seed: of the division into folds; the same seed gives the same result.
        folds: 2 or more.

    Raises:
        ValueError: see `frechet_distance`; also for too few images for the folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    left, right = checked_pair(real, synthetic)
    if folds < 2:
        raise ValueError(f"folds is {folds}, but must be 2 or more")
    if min(len(left), len(right)) < folds:
        raise UserError(
            f"{len(left)} real and {len(right)} synthetic images are too few for {folds} folds: "
            f"each side needs {folds} or more"
        )
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    division = StratifiedKFold(folds, shuffle=True, random_state=seed)
    rows, labels = np.concatenate([left, right]), np.repeat([0, 1], [len(left), len(right)])
    found = cross_val_predict(probe, rows, labels, cv=division)
    return 100 * float(balanced_accuracy_score(labels, found))


def bn_statistics(model: nn.Module, batches: Iterable[Tensor]) -> Statistics:
    """What arrives at each BatchNorm layer: each channel's mean and biased variance over all images.

    Exact whatever the batches were: their moments are combined in float64 (Chan, Golub and LeVeque,
    1979). The layers themselves normalise by their running statistics, as in any evaluation.

    Args:
        model: a network in eval mode, in any device and precision, with BatchNorm layers of torch or
            derived from them, such as timm's BatchNormAct2d.
        batches: (batch, 3, height, width) float images as the model takes them, moved to its device.

    Returns:
        layer -> (mean, variance), (channels,) float64 each, in the order in which layers are first
        called. Layers that are not called are left out; one that is called twice has both inputs.

    Raises:
        ValueError: for a model without BatchNorm or in training mode, when there is no batch, and for
            NaN or infinity, naming the first layer.
    """
    import torch

    layers = {name: model.get_submodule(name) for name in batchnorm_layers(model)}
    if not layers:
        raise UserError(f"{type(model).__name__} has no BatchNorm layer: there are no statistics")
    if any(module.training for module in (model, *layers.values())):
        raise ValueError("the model is in training mode, which changes it: call model.eval() first")
    found: dict[str, Moments] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = _merge(found.get(name), inputs[0])

        return add

    device = next(model.parameters()).device
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for images in batches:
            with torch.inference_mode():
                model(images.to(device))
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("no batch of images: there are no statistics")
    for name, (_, mean, var) in found.items():
        if not (mean + var).isfinite().all():
            raise UserError(f"the inputs of layer {name} have NaN or infinity")
    return {name: (mean.cpu().numpy(), var.cpu().numpy()) for name, (_, mean, var) in found.items()}


def statistics_distance(
    real: Statistics, synthetic: Statistics, *, eps: float = 1e-5
) -> list[LayerShift]:
    """How far two sets of images are apart in each layer, in the order of `real`; see `LayerShift`.

    Args:
        real, synthetic: from `bn_statistics` of one model, for the images of each.
        eps: added to every variance; the default is that of most BatchNorm layers.

    Raises:
        ValueError: for no layer, different layers, or different numbers of channels.
    """
    if not real:
        raise ValueError("there are no layers to compare")
    if differing := sorted(set(real) ^ set(synthetic)):
        raise ValueError(f"only one side has statistics of the layers {', '.join(differing)}")
    shifts = []
    for layer, (m, v) in real.items():
        m2, v2 = synthetic[layer]
        if m.shape != m2.shape:
            raise ValueError(
                f"layer {layer} has {m.size} channels for real images and {m2.size} for synthetic "
                "ones: they must come from the same model"
            )
        v, v2 = v + eps, v2 + eps
        half_log = np.log(v2 / v) / 2
        # (v / v' + v' / v - 2) / 4 = sinh² of half the log ratio
        divergence = np.sinh(half_log) ** 2 + (m2 - m) ** 2 * (1 / v + 1 / v2) / 4
        mean, spread = ((m2 - m) ** 2 / v).mean() ** 0.5, (half_log**2).mean() ** 0.5
        shifts.append(
            LayerShift(layer, m.size, float(mean), float(spread), float(divergence.mean()))
        )
    return shifts


def batchnorm_layers(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers of `model`, in the order in which they were registered."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def _merge(before: Moments | None, inputs: Tensor) -> Moments:
    """Count, mean and variance of each channel, with those of (rows, channels, ...) inputs added."""
    import torch

    wide = (inputs.cpu() if inputs.device.type == "mps" else inputs).double()  # mps has no float64
    inner = [0, *range(2, wide.ndim)]
    count, (var, mean) = wide[:, 0].numel(), torch.var_mean(wide, dim=inner, correction=0)
    if before is None:
        return count, mean, var
    share = count / (before[0] + count)
    gap = mean - before[1]
    between = share * (1 - share) * gap**2
    return before[0] + count, before[1] + share * gap, torch.lerp(before[2], var, share) + between


def _covariance_root(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """R of (at most dim rows, dim), with Rᵀ R the unbiased covariance of `rows`."""
    centred = (rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def _kernel_gaps(left: NDArray[np.float64], right: NDArray[np.float64], bandwidth: float) -> float:
    """The sum of 1 - k over all pairs of a left and a right unit row."""
    total = 0.0
    for i in range(0, len(left), BLOCK):
        for j in range(0, len(right), BLOCK):
            # |x - y|² / 2 = 1 - x·y for rows of length 1
            apart = (1.0 - left[i : i + BLOCK] @ right[j : j + BLOCK].T).clip(0)
            total -= float(np.expm1(apart / -(bandwidth**2)).sum())
    return total
