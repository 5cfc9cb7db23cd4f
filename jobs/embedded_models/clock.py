"""A training run measured in minutes, not steps: its steps, its learning rate, its log.

In: `Settings` and a stage's name. Out: step numbers until the time is up.
"""

import math
import time
from collections.abc import Iterator

import torch

from jobs.embedded_models.settings import Settings

SMOKE_STEPS = 4
SECONDS_BETWEEN_LINES = 15


def learning_rate(fraction: float, *, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up to `peak`, then a cosine down to one hundredth of it.

    Args:
        fraction: how much of the run has passed, 0 to 1.
        peak: the rate at the end of the warm-up (one hundredth more, in fact).
        warmup: the share of the run that warms up.
    """
    if fraction < warmup:
        return peak * fraction / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))
    return peak * (cosine + 0.01)


class Clock:
    """Counts the steps of one stage until its minutes have passed."""

    def __init__(self, stage: str, settings: Settings) -> None:
        self.stage = stage
        self.seconds = settings.minutes * 60
        self.smoke = settings.smoke
        self.started = time.monotonic()
        self.last_line = self.started
        self.step = 0

    @property
    def fraction(self) -> float:
        """How much of the stage's time has passed, 0 to 1."""
        return min(1.0, (time.monotonic() - self.started) / self.seconds)

    def steps(self) -> Iterator[int]:
        """Step numbers from 1, until the time is up; always at least one."""
        self.started = self.last_line = time.monotonic()
        while self.step == 0 or self.fraction < 1:
            if self.smoke and self.step >= SMOKE_STEPS:
                return
            self.step += 1
            yield self.step

    def set_learning_rate(
        self, optimizer: torch.optim.Optimizer, *, peak: float, warmup: float = 0.03
    ) -> None:
        """Gives every parameter group the rate that is due now."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.fraction, peak=peak, warmup=warmup)

    def log(self, **figures: torch.Tensor) -> None:
        """Prints scalar figures, at most every 15 s: reading a tensor waits for the GPU."""
        now = time.monotonic()
        if now - self.last_line < SECONDS_BETWEEN_LINES and not self.smoke:
            return
        self.last_line = now
        shown = " ".join(f"{name} {float(figure.detach()):.4f}" for name, figure in figures.items())
        print(f"[{self.stage}] {now - self.started:.0f}s step {self.step} {shown}", flush=True)


def step_down(
    loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]
) -> None:
    """One optimizer step on `loss`, with the gradient's norm clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
