"""Stage `diffusion`: the teacher, a latent diffusion model with v-prediction.

In: latents and captions. Out: `work/unet_teacher.safetensors`, and a sheet of samples with
DPM-Solver, guidance 3, 12 steps.
"""

from pathlib import Path

import torch

from jobs.embedded_models import noise
from jobs.embedded_models.clock import Clock, step_down
from jobs.embedded_models.samples import teacher_pipeline, write_sheet
from jobs.embedded_models.settings import Settings
from jobs.embedded_models.unet import (
    Latents,
    MovingAverage,
    Prompts,
    load_unet,
    predictor,
    save_unet,
)

PEAK_LEARNING_RATE = 6e-4
EMPTY_PROMPTS = 0.12  # share of training without a prompt, for classifier-free guidance
DECAY = 0.9995


def train_diffusion(settings: Settings) -> Path:
    """Trains the teacher; returns the file of its averaged weights."""
    device = settings.device
    torch.manual_seed(0)
    latents = Latents(settings, digit_weight=1.0, photograph_weight=1.2)
    prompts, unet = Prompts(settings), load_unet(settings)
    predict, average = predictor(unet, settings), MovingAverage(unet, DECAY)
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=settings.compiles,
    )
    shares, size = noise.signal_shares(device), settings.batch(1024, 8)
    clock = Clock("diffusion", settings)
    for step in clock.steps():
        clock.set_learning_rate(optimizer, peak=PEAK_LEARNING_RATE)
        batch = latents.batch(size)
        embedded = prompts.embed(batch.ids, drop=EMPTY_PROMPTS)
        steps = torch.randint(0, noise.TIME_STEPS, (size,), device=device)
        noisy = noise.add_noise(batch.clean, batch.noise, shares, steps)
        target = noise.velocity(batch.clean, batch.noise, shares, steps)
        error = ((predict(noisy, steps, embedded) - target) ** 2).mean((1, 2, 3))
        loss = 2 * (error * noise.min_snr_weight(shares, steps)).mean()
        step_down(loss, optimizer, parameters)
        average.update(unet, step)
        clock.log(loss=loss)

    path = save_unet(average.weights, settings.work / "unet_teacher.safetensors")
    write_sheet(
        teacher_pipeline(settings, load_unet(settings, path)),
        settings.work / "teacher.png",
        steps=2 if settings.smoke else 12,
        guidance=3.0,
        short=settings.smoke,
    )
    return path
