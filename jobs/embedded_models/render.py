"""Stage `render`: draws all training pictures with their captions, in parallel processes.

In: the packed photographs, WordNet, fonts. Out: `work/pictures.npy (n, 64, 64, 3) uint8`,
`work/captions.npy (n, 2, 64) int16` token ids, and `work/labels.npy (n,) int16`.
"""

import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.embedded_models.settings import Settings, stable_seed
from jobs.embedded_models.tokenizer import CONTEXT, load_tokenizer, token_ids
from jobs.embedded_models.wordnet import read_lexicon

PICTURES = {"natural": 100_000, "styled": 56_000, "digit": 120_000}
SMOKE_PICTURES = {"natural": 24, "styled": 16, "digit": 40}
PICTURES_A_JOB, SMOKE_PICTURES_A_JOB = 2000, 20
BACKGROUNDS = 300  # photographs that the digits of one job can lie on
STYLED_DIGITS = 0.16  # share of the digits that go through a filter
FIRST_DIGIT_LABEL = 1000  # photographs' labels are below


@dataclass(frozen=True)
class Job:
    """Pictures `first` to `first + count` of one kind, from their own seed."""

    kind: str
    first: int
    count: int

    @property
    def seed(self) -> int:
        """The same whichever process draws it."""
        return stable_seed(self.kind, self.first)


def plan_jobs(pictures: dict[str, int], size: int) -> list[Job]:
    """Splits the pictures of each kind into jobs of at most `size`."""
    return [
        Job(kind, first, min(size, total - first))
        for kind, total in pictures.items()
        for first in range(0, total, size)
    ]


def draw(job: Job, settings: Settings) -> tuple[np.ndarray, list[tuple[str, str]], list[int]]:
    """Draws one job: pictures, two captions of each, and labels."""
    from jobs.embedded_models.canvas import cv2
    from jobs.embedded_models.digits import digit_picture
    from jobs.embedded_models.natural import natural_picture
    from jobs.embedded_models.photographs import Photographs

    cv2.setNumThreads(1)
    rng = random.Random(job.seed)
    classes = read_lexicon(settings.work / "wordnet.json").classes
    photographs = Photographs(settings.work)
    fonts = sorted(path for path in (settings.data / "fonts").iterdir() if path.is_file())

    def any_photograph() -> tuple[bytes, int]:
        return photographs[rng.randrange(len(photographs))]

    backgrounds = [
        (jpeg, classes[label]) for jpeg, label in (any_photograph() for _ in range(BACKGROUNDS))
    ]
    pictures, captions, labels = [], [], []
    for index in range(job.first, job.first + job.count):
        if job.kind == "digit":
            label = FIRST_DIGIT_LABEL + index % 10
            styled = rng.random() < STYLED_DIGITS
            picture, caption = digit_picture(index % 10, fonts, backgrounds, rng, restyle=styled)
            second = caption
        elif job.kind == "styled":
            jpeg, label = any_photograph()
            picture, caption = natural_picture(jpeg, classes[label], rng, restyle=True)
            second = caption
        else:
            jpeg, label = photographs[index % len(photographs)]
            picture, caption = natural_picture(jpeg, classes[label], rng)
            # Another wording, of another crop: what it says of the background may not hold here.
            second = natural_picture(jpeg, classes[label], rng)[1].split(" background")[0]
        pictures.append(picture)
        captions.append((caption, second))
        labels.append(label)
    return np.stack(pictures), captions, labels


@contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    """`map` in this process or, in the same order, over several."""
    if workers <= 1:
        yield map
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            yield pool.imap


def render(settings: Settings) -> Path:
    """Draws the pictures; the same ones however many processes draw. Returns `pictures.npy`."""
    settings.input("fonts", "a folder of .ttf or .otf files")
    settings.output_of("wordnet", "wordnet.json")
    plan = SMOKE_PICTURES if settings.smoke else PICTURES
    jobs = plan_jobs(plan, SMOKE_PICTURES_A_JOB if settings.smoke else PICTURES_A_JOB)
    total = sum(plan.values())
    path = settings.work / "pictures.npy"
    pictures = np.lib.format.open_memmap(path, "w+", np.uint8, (total, 64, 64, 3))
    ids = np.zeros((total, 2, CONTEXT), np.int16)
    labels = np.zeros(total, np.int16)
    tokenizer, start = load_tokenizer(settings), 0
    with _mapper(settings.workers) as mapper:
        for drawn, captions, drawn_labels in mapper(partial(draw, settings=settings), jobs):
            rows = slice(start, start + len(drawn))
            pictures[rows], labels[rows] = drawn, drawn_labels
            flat = [caption for pair in captions for caption in pair]
            ids[rows] = token_ids(tokenizer, flat).reshape(len(drawn), 2, CONTEXT)
            start += len(drawn)
            print(f"[render] {start} of {total}", flush=True)
    pictures.flush()
    np.save(settings.work / "captions.npy", ids)
    np.save(settings.work / "labels.npy", labels)
    return path


def load_rendered(settings: Settings, name: str) -> torch.Tensor:
    """`pictures`, `captions` or `labels`, on the training device."""
    path = settings.output_of("render", f"{name}.npy")
    return torch.from_numpy(np.load(path, allow_pickle=False)).to(settings.device)
