"""Stable Diffusion's noise schedule and v-prediction, as pure functions.

In: latents, noise and time steps. Out: noisy latents, targets, and what a prediction means.
"""

import torch

TIME_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
SCHEDULER = {
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
# Latent consistency models (Luo et al. 2023, arXiv 2310.04378), as diffusers' LCMScheduler.
SOLVER_STEPS = 50
TIMESTEP_SCALING, SIGMA_DATA = 10.0, 0.5


def signal_shares(device: str = "cpu") -> torch.Tensor:
    """The share of signal left in the variance at each time step: `(1000,)`, falling."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIME_STEPS, device=device) ** 2
    return (1 - betas).cumprod(0)


def _over_latents(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def amplitudes(shares: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Amplitudes of signal and noise at time steps `(n,)`: two of `(n, 1, 1, 1)`."""
    share = _over_latents(shares[steps])
    return share.sqrt(), (1 - share).sqrt()


def add_noise(
    clean: torch.Tensor, noise: torch.Tensor, shares: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """Latents as they are at the time steps."""
    signal, sigma = amplitudes(shares, steps)
    return signal * clean + sigma * noise


def velocity(
    clean: torch.Tensor, noise: torch.Tensor, shares: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """The target v of Salimans and Ho 2022 (arXiv 2202.00512)."""
    signal, sigma = amplitudes(shares, steps)
    return signal * noise - sigma * clean


def clean_and_noise(
    noisy: torch.Tensor, v: torch.Tensor, shares: torch.Tensor, steps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean latents and the noise that a prediction v implies: the inverse of the above."""
    signal, sigma = amplitudes(shares, steps)
    return signal * noisy - sigma * v, sigma * noisy + signal * v


def min_snr_weight(shares: torch.Tensor, steps: torch.Tensor, *, cap: float = 5.0) -> torch.Tensor:
    """Loss weight of v-prediction by Min-SNR (Hang et al. 2023, arXiv 2303.09556): `(n,)`."""
    ratio = shares[steps] / (1 - shares[steps])
    return ratio.clamp(max=cap) / (ratio + 1)


def solver_grid(device: str = "cpu") -> torch.Tensor:
    """The 50 time steps between which consistency is learnt: 19, 39, ... 999."""
    stride = TIME_STEPS // SOLVER_STEPS
    return torch.arange(1, SOLVER_STEPS + 1, device=device) * stride - 1


def consistency_output(
    noisy: torch.Tensor, v: torch.Tensor, shares: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """The consistency function: nearly the identity at step 0, the clean latents elsewhere."""
    scaled = steps.float() * TIMESTEP_SCALING
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
    clean, _ = clean_and_noise(noisy, v, shares, steps)
    return _over_latents(skip) * noisy + _over_latents(out) * clean
