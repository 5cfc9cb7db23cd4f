"""The verb `training` of `jobs/bench.py`: ways to normalise two domains, on the same model and batch."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench_device import device_name, dtype_name, wait_for


def norms(
    model: str, batch_size: int, image_size: int, *, rounds: int, steps: int, compiled: bool
) -> dict[str, Any]:
    """Training steps per second of each contender; rounds alternate between them.

    A step is forward, L_real + L_synth, backward and SGD, in bfloat16 where the device computes in it;
    channels_last. `dual 1:3` is ours with a quarter of real images, which timm's SplitBN cannot do.
    """
    import torch

    from ray_synth.device import pick_device, pick_dtype

    device = pick_device("auto")
    if device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    dtype = pick_dtype("auto", device)
    torch.manual_seed(0)
    contenders = _contenders(model, batch_size, image_size, device, dtype, compiled=compiled)
    seconds = _seconds(contenders, device, rounds=rounds, steps=steps)
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds["plain BN"], times, strict=True))
        for name, times in seconds.items()
    }
    how = "compiled" if compiled else "eager"
    print(
        f"{model}, {image_size} px, batch {batch_size}, {dtype_name(dtype)} on {device}, {how}; "
        f"images/s, and the median ratio to plain BN over {rounds} rounds"
    )
    for name, times in seconds.items():
        print(f"{name:<16} {batch_size / statistics.median(times):9.1f} {ratios[name]:7.3f}x")
    return {
        "dual_over_plain": round(ratios["dual BN 1:1"], 4),
        "dual_1_to_3_over_plain": round(ratios["dual BN 1:3"], 4),
        "splitbn_over_plain": round(ratios["timm SplitBN"], 4),
        "two_forwards_over_plain": round(ratios["two forwards"], 4),
        "dtype": dtype_name(dtype),
        "device": device_name(device),
    }


def _contenders(
    model: str, batch_size: int, image_size: int, device: str, dtype: Any, *, compiled: bool
) -> dict[str, Callable[[], None]]:
    """Ways to normalise two domains: one step of each, from the same weights on the same batch."""
    import timm
    import torch
    from timm.layers import convert_splitbn_model

    from ray_synth.training.dual_bn import convert_dual_bn

    base = timm.create_model(model, num_classes=1000)
    half, quarter = batch_size // 2, batch_size // 4
    nets = {
        "plain BN": (copy.deepcopy(base), half, False),
        "timm SplitBN": (convert_splitbn_model(copy.deepcopy(base), 2), half, False),
        "two forwards": (copy.deepcopy(base), half, True),
        "dual BN 1:1": (convert_dual_bn(copy.deepcopy(base)), half, False),
        "dual BN 1:3": (convert_dual_bn(copy.deepcopy(base)), quarter, False),
    }
    x = torch.randn(batch_size, 3, image_size, image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (batch_size,), device=device)
    found = {}
    for name, (net, num_real, twice) in nets.items():
        net = net.to(device).to(memory_format=torch.channels_last).train()
        found[name] = _stepper(net, x, y, num_real, twice=twice, dtype=dtype, compiled=compiled)
    return found


def _seconds(
    contenders: dict[str, Callable[[], None]], device: str, *, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Seconds per step of each contender in each round."""
    for step in contenders.values():
        for _ in range(3):
            step()  # warm up; compiles
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        # Each starts the round in turn, so that none is always the one after a pause.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            wait_for(device)
            started = time.perf_counter()
            for _ in range(steps):
                contenders[name]()
            wait_for(device)
            seconds[name].append((time.perf_counter() - started) / steps)
    return seconds


def _stepper(
    net: Any, x: Any, y: Any, num_real: int, *, twice: bool, dtype: Any, compiled: bool
) -> Callable[[], None]:
    """One training step of a contender, as a function."""
    import torch

    from ray_synth.training.dual_bn import domain_split
    from ray_synth.training.recipe import mixed_loss

    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    forward = torch.compile(net) if compiled else net

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
            if twice:
                logits = torch.cat([forward(x[:num_real]), forward(x[num_real:])])
            else:
                with domain_split(net, num_real, len(x) - num_real):
                    logits = forward(x)
        mixed_loss(logits.float(), y, num_real, 1.0)[0].backward()
        optimizer.step()

    return step
