"""Stage `distillation`: the teacher's 12 guided steps become 4 without guidance.

Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378). In: the teacher and its data.
Out: `work/sd`, a diffusers `StableDiffusionPipeline` with an LCM scheduler.
"""

from pathlib import Path

import torch

from jobs.embedded_models import noise
from jobs.embedded_models.clock import Clock, step_down
from jobs.embedded_models.samples import student_pipeline, write_sheet
from jobs.embedded_models.settings import Settings
from jobs.embedded_models.unet import (
    Batch,
    Latents,
    MovingAverage,
    Predict,
    Prompts,
    load_unet,
    predictor,
)

PEAK_LEARNING_RATE = 1.5e-4
DECAY = 0.995
GUIDANCE_FROM, GUIDANCE_TO = 2.2, 3.2
HUBER = 1e-3


@torch.no_grad()
def consistency_target(
    batch: Batch,
    steps: tuple[torch.Tensor, torch.Tensor],
    prompts: tuple[torch.Tensor, torch.Tensor],
    predict: tuple[Predict, Predict],
    shares: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the student should say: the average's answer one guided teacher step further on.

    Args:
        batch: latents and noise.
        steps: time steps `(n,)`, and the ones after them.
        prompts: embeddings of the captions, and of the empty prompt.
        predict: the teacher and the student's moving average.
        shares: `noise.signal_shares`.

    Returns:
        The noisy latents that the student sees, and its target.
    """
    (now, later), (caption, empty), (teacher, average) = steps, prompts, predict
    noisy = noise.add_noise(batch.clean, batch.noise, shares, now)
    spread = GUIDANCE_TO - GUIDANCE_FROM
    guidance = GUIDANCE_FROM + spread * torch.rand(len(noisy), 1, 1, 1, device=noisy.device)
    unguided = teacher(noisy, now, empty)
    v = unguided + guidance * (teacher(noisy, now, caption) - unguided)
    clean, remaining = noise.clean_and_noise(noisy, v, shares, now)
    further = noise.add_noise(clean, remaining, shares, later)  # one DDIM step
    target = noise.consistency_output(further, average(further, later, caption), shares, later)
    return noisy, target


def distil(settings: Settings) -> Path:
    """Trains the student, joins all parts into one pipeline; returns `work/sd`."""
    device = settings.device
    weights = settings.output_of("diffusion", "unet_teacher.safetensors")
    torch.manual_seed(0)
    latents = Latents(settings, digit_weight=1.3, photograph_weight=1.2)
    prompts = Prompts(settings)
    unet = load_unet(settings, weights)
    teacher = load_unet(settings, weights).eval().requires_grad_(False)
    averaged = load_unet(settings, weights).requires_grad_(False)
    average = MovingAverage(unet, DECAY)
    predict = predictor(unet, settings)
    predict_target = predictor(teacher, settings), predictor(averaged, settings)
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=settings.compiles,
    )
    shares, grid = noise.signal_shares(device), noise.solver_grid(device)
    size, clock = settings.batch(512, 8), Clock("distillation", settings)
    empty = prompts.empty(size)
    for step in clock.steps():
        clock.set_learning_rate(optimizer, peak=PEAK_LEARNING_RATE)
        batch = latents.batch(size)
        caption = prompts.embed(batch.ids)
        rung = torch.randint(1, noise.SOLVER_STEPS, (size,), device=device)
        steps = grid[rung], grid[rung - 1]
        noisy, target = consistency_target(batch, steps, (caption, empty), predict_target, shares)
        made = noise.consistency_output(noisy, predict(noisy, steps[0], caption), shares, steps[0])
        # Pseudo-Huber: a few wild latents must not rule the step.
        loss = (((made - target) ** 2 + HUBER**2).sqrt() - HUBER).mean()
        step_down(loss, optimizer, parameters)
        if average.update(unet, step):
            averaged.load_state_dict(average.weights)
        clock.log(loss=loss)

    unet.load_state_dict(average.weights)
    pipeline = student_pipeline(settings, unet)
    folder = settings.work / "sd"
    pipeline.save_pretrained(folder)
    sheet = settings.work / "student.png"
    write_sheet(pipeline, sheet, steps=4, guidance=1.0, short=settings.smoke)
    return folder
