"""What CLIP takes any picture for: makes the pictures and the statistics that the package carries.

`python jobs/background.py` draws 500 small pictures of many things, in many styles, with the embedded
generator, so that they are the project's own: background_files/pictures.jpg of ray_synth/meaning. The
embedded CLIP's statistics of them come beside it. About 3 minutes on 2 cores.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from jobs.embedded_models.captions import DIGITS
from jobs.embedded_models.samples import SURFACES
from ray_synth.data.imagenet import class_names
from ray_synth.meaning.background import COLUMNS, FOLDER, SIDE, Background, pictures
from ray_synth.meaning.candidates import with_article
from ray_synth.meaning.clip import ClipModel
from ray_synth.prompting.styles import load_styles

if TYPE_CHECKING:
    from PIL import Image

NUM_PHOTOS, NUM_DIGITS, BATCH = 320, 60, 20


def main(
    out: Annotated[Path, typer.Option(help="folder of both files")] = FOLDER,
    draw: Annotated[bool, typer.Option(help="draw new pictures, not only measure them")] = True,
) -> None:
    """Draw the pictures, and measure them with the embedded CLIP."""
    out.mkdir(parents=True, exist_ok=True)
    if draw:
        sheet(draw_all(prompts())).save(out / "pictures.jpg", quality=60)
    found = Background.of(ClipModel().encode_images(pictures(out / "pictures.jpg")))
    found.save(out / "embedded.safetensors")
    print(f"{found.count:g} pictures; files in {out}")


def prompts() -> list[str]:
    """Photographs of every third of ImageNet's classes, others in each style twice, and digits."""
    names = [with_article(name.split(" (")[0]) for name in class_names()]
    styles = load_styles() * 2
    return [
        *(f"a photo of {name}" for name in names[::3][:NUM_PHOTOS]),
        *(f"{style.name} of {name}" for style, name in zip(styles, names[1::8], strict=False)),
        *(
            f"a {DIGITS[i % 10]}, the number {i % 10}, {SURFACES[(i + i // 10) % len(SURFACES)]}"
            for i in range(NUM_DIGITS)
        ),
    ]


def draw_all(texts: list[str]) -> list[Image.Image]:
    """One picture of SIDE x SIDE per text; the text's place is its seed."""
    import torch
    from diffusers import AutoPipelineForText2Image

    from ray_synth.embedded import sd_folder

    pipeline = AutoPipelineForText2Image.from_pretrained(sd_folder(), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    found: list[Image.Image] = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        found += pipeline(
            part, num_inference_steps=4, guidance_scale=1, height=SIDE, width=SIDE, generator=seeds
        ).images
    return found


def sheet(images: list[Image.Image]) -> Image.Image:
    """The pictures side by side, COLUMNS in a row."""
    from PIL import Image

    found = Image.new("RGB", (SIDE * COLUMNS, SIDE * -(-len(images) // COLUMNS)))
    for i, image in enumerate(images):
        found.paste(image, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
    return found


if __name__ == "__main__":
    typer.run(main)
