"""Batch norm of a batch's two parts by two layers, as fast as one batch norm of the whole.

In: `x`, (rows, channels, ...), the sizes of its two parts, and two plain BatchNorm layers in training.
Out: `x` normalised, in one tensor; the layers' running statistics are updated as they do it themselves.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _NormaliseParts(torch.autograd.Function):
    """Two batch norms of a batch's two parts, written into one output without a copy.

    The kernels are PyTorch's own. Measured, `torch.cat` of the outputs costs as much again as its
    backward, and this needs the backward's alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: list[int], eps: tuple[float, float], *norms: Any
    ) -> Any:
        """`norms`: weight, bias, running mean, running variance and momentum of main, then of aux."""
        out = torch.empty_like(x)
        saved = []
        for part, into, norm, e in zip(
            x.split(sizes), out.split(sizes), (norms[:5], norms[5:]), eps, strict=True
        ):
            weight, bias, running_mean, running_var, momentum = norm
            # in float32 for half-precision input, as the plain layer keeps them
            stats = (
                running_mean if running_mean is not None else torch.empty(0, dtype=torch.float32)
            )
            mean = torch.empty_like(stats, memory_format=torch.contiguous_format)
            invstd = torch.empty_like(mean)
            torch.native_batch_norm(
                part,
                weight,
                bias,
                running_mean,
                running_var,
                True,
                momentum,
                e,
                out=(into, mean, invstd),
            )
            saved += [weight, running_mean, running_var, mean, invstd]
        ctx.save_for_backward(x, *saved)
        ctx.sizes, ctx.eps = sizes, eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *saved = ctx.saved_tensors
        inputs, others = [], []
        for part, grad_part, norm, e in zip(
            x.split(ctx.sizes), grad.split(ctx.sizes), (saved[:5], saved[5:]), ctx.eps, strict=True
        ):
            weight, running_mean, running_var, mean, invstd = norm
            affine = weight is not None
            g, g_weight, g_bias = torch.ops.aten.native_batch_norm_backward(
                grad_part,
                part,
                weight,
                running_mean,
                running_var,
                mean,
                invstd,
                True,
                e,
                [ctx.needs_input_grad[0], affine, affine],
            )
            inputs.append(g)
            others += [g_weight, g_bias, None, None, None]
        whole = torch.cat(inputs) if ctx.needs_input_grad[0] else None
        return whole, None, None, *others


def is_plain(norm: nn.Module) -> bool:
    """Whether the two functions below compute what this layer's own forward does."""
    return (
        isinstance(norm, _BatchNorm)
        and not isinstance(norm, nn.SyncBatchNorm)
        and norm.training
        and norm.running_mean is not None
    )


def _count_batch(norm: Any) -> Any:
    """Count a batch; the weight that its statistics get (a float, or a tensor)."""
    norm.num_batches_tracked.add_(1)
    if norm.momentum is None:  # a cumulative average
        return 1.0 / norm.num_batches_tracked
    return norm.momentum


def normalise_parts(x: Tensor, sizes: list[int], main: Any, aux: Any) -> Tensor:
    """Eager: PyTorch's batch norm kernels, each on its part of the batch."""
    norms: list[Any] = []
    for norm in (main, aux):
        norm._check_input_dim(x)
        momentum = float(_count_batch(norm))
        norms += [norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum]
    return _NormaliseParts.apply(x, sizes, (main.eps, aux.eps), *norms)


def normalise_rows(x: Tensor, sizes: list[int], main: Any, aux: Any) -> Tensor:
    """Compiled: statistics row by row, then one affine map with factors by row.

    A compiler fuses this as it does one plain batch norm: it reads `x` once for the statistics and
    once for the map, with no part cut out or put together. Rows are of equal size, so a domain's
    variance is the mean of its rows' variances plus the variance of their means.
    """
    main._check_input_dim(x)
    inner = tuple(range(2, x.ndim))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    row_vars, row_means = (
        torch.var_mean(wide, dim=inner, correction=0) if inner else (torch.zeros_like(wide), wide)
    )
    size = x[0, 0].numel()
    factors = []
    for norm, means, variances in zip(
        (main, aux), row_means.split(sizes), row_vars.split(sizes), strict=True
    ):
        between, mean = torch.var_mean(means, dim=0, correction=0)
        var = variances.mean(0) + between
        momentum = _count_batch(norm)
        with torch.no_grad():
            count = len(means) * size
            norm.running_mean.lerp_(mean.detach().to(norm.running_mean.dtype), momentum)
            unbiased = var.detach() * (count / (count - 1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
        scale = (var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = torch.zeros_like(mean) if norm.bias is None else norm.bias
        factors.append(torch.stack([mean, scale, bias]).unsqueeze(1).expand(3, len(means), -1))
    shape = (3, *x.shape[:2], *(1 for _ in inner))
    mean, scale, bias = torch.cat(factors, dim=1).view(shape)
    return ((wide - mean) * scale + bias).to(x.dtype)
