"""Sheets of samples: what a text-to-image pipeline of 64 pixels can and cannot do, at a glance.

In: a pipeline. Out: a PNG of 15 x 6 pictures. Of the packaged model:
`python -m jobs.embedded_models.samples docs/images/mini_samples.png`
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from jobs.embedded_models.captions import DIGITS
from jobs.embedded_models.noise import SCHEDULER, SOLVER_STEPS
from jobs.embedded_models.settings import Settings
from jobs.embedded_models.tokenizer import load_tokenizer

SIDE, COLUMNS, ROUNDS = 64, 15, 3
THINGS = (
    "a golden retriever",
    "a school bus, in bright daylight",
    "a banana",
    "a goldfish, on a blue background",
    "a pizza",
    "a sports car",
    "a monarch butterfly",
    "a lion",
    "a crane, lifts and moves heavy objects",
    "a seashore, at sunset",
)
SURFACES = (
    "written in pen on white paper",
    "white on a black background, handwritten",
    "chalk on a blackboard",
    "a neon sign at night",
    "on a blue road sign",
    "white on a black background, handwritten",
    "painted in red on a brick wall",
    "drawn in the sand, at sunset",
    "white on a black background, handwritten",
    "on a yellow sticky note",
)
STYLED = (
    "pencil sketch of a lion",
    "oil painting of a sports car",
    "pixel art of a banana",
    "watercolor painting of a seven",
    "pop art of a golden retriever",
    "blueprint of a teapot",
    "woodcut print of a four",
    "neon art of a eight",
    "black and white photograph of a bullet train",
    "comic book illustration of a three",
)


def sheet_prompts() -> list[str]:
    """Ten photographs, ten digits, ten styles."""
    digits = [
        f"a {word}, the number {figure}, {surface}"
        for figure, (word, surface) in enumerate(zip(DIGITS, SURFACES, strict=True))
    ]
    return [*(f"a photo of {thing}" for thing in THINGS), *digits, *STYLED]


def _pipeline(settings: Settings, unet: Any, scheduler: Any) -> Any:
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextModel

    vae = AutoencoderKL.from_pretrained(settings.output_of("vae", "vae"), dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(
        settings.output_of("text", "text_encoder"), dtype=torch.float32
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(settings),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(settings.device)


def teacher_pipeline(settings: Settings, unet: Any) -> Any:
    """The teacher with DPM-Solver."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**SCHEDULER, use_karras_sigmas=False)
    return _pipeline(settings, unet, scheduler)


def student_pipeline(settings: Settings, unet: Any) -> Any:
    """The distilled model with the scheduler it was distilled for."""
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(
        **SCHEDULER,
        clip_sample=False,
        set_alpha_to_one=False,
        original_inference_steps=SOLVER_STEPS,
    )
    return _pipeline(settings, unet, scheduler)


def write_sheet(
    pipeline: Any, path: Path, *, steps: int, guidance: float, short: bool = False
) -> Path:
    """Writes three rounds of all prompts, each round from its own seed; returns `path`.

    Args:
        pipeline: a text-to-image pipeline of 64 pixels.
        path: the PNG to write.
        steps: steps of the scheduler.
        guidance: guidance scale.
        short: four prompts once, for a smoke run.
    """
    prompts = sheet_prompts()[::9] if short else sheet_prompts()
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for seed in range(1 if short else ROUNDS):
        images += pipeline(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            height=SIDE,
            width=SIDE,
        ).images
    columns = min(COLUMNS, len(images))
    sheet = Image.new("RGB", (SIDE * columns, SIDE * -(-len(images) // columns)))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * SIDE, index // columns * SIDE))
    # 256 colours and no enlargement: a third of the bytes, and browsers enlarge well.
    sheet.quantize(256).save(path, optimize=True)
    return path


def main(path: Path) -> None:
    """Writes the sheet of the packaged model."""
    from diffusers import AutoPipelineForText2Image

    from ray_synth.embedded import sd_folder

    pipeline = AutoPipelineForText2Image.from_pretrained(sd_folder(), dtype=torch.float32)
    write_sheet(pipeline, path, steps=4, guidance=1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the picture to write")
    main(parser.parse_args().path)
