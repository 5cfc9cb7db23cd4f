"""A written model held against the eager one, on pictures of the run or of the user.

Weights and something that gives logits in; how far apart the two are, out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ray_synth.config import load_run_config
from ray_synth.data.dataset import load_index, read_index, select
from ray_synth.data.images import MAX_PIXELS
from ray_synth.errors import UserError, shortened
from ray_synth.export.predictions import find_pictures
from ray_synth.export.weights import Weights
from ray_synth.generation.selection import choose, read_chosen, scan
from ray_synth.storage.folder import Folder
from ray_synth.storage.hub import is_hub_id

if TYPE_CHECKING:
    from ray_synth.training.deployed import Deployed

CHECKED = 64  # pictures
TOLERANCE = 1e-4  # of the largest logit, or of 1 where all are smaller
Run = Callable[[np.ndarray], np.ndarray]  # pixels to logits


class Checked(NamedTuple):
    """How far a written model is from the eager one.

    Attributes:
        pictures: that both were shown.
        of: what these are.
        difference: the largest between two logits.
        largest: the largest logit.
    """

    pictures: int
    of: str
    difference: float
    largest: float

    @property
    def equal(self) -> bool:
        return self.difference <= TOLERANCE * max(1.0, self.largest)


def eager(weights: Weights) -> Deployed:
    """The trained model with its normalisation, on the CPU."""
    from ray_synth.training.deployed import Deployed

    card = weights.card
    return Deployed(weights.load(), mean=card["mean"], std=card["std"])


def compare(model: Deployed, run: Run, pixels: np.ndarray, of: str) -> Checked:
    """The eager model against a written one, on all pictures at once and on batches of other sizes."""
    import torch

    difference = largest = 0.0
    for batch in (pixels, pixels[:1], pixels[-3:]):
        with torch.inference_mode():
            expected = model(torch.from_numpy(batch))[0].numpy()
        found = run(batch)
        if found.shape != expected.shape or not np.isfinite(found).all():
            return Checked(len(pixels), of, float("inf"), 0.0)
        difference = max(difference, float(np.abs(found - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    return Checked(len(pixels), of, difference, largest)


# Pictures to check on.


def check_pixels(weights: Weights, given: list[str] | None) -> tuple[np.ndarray, str]:
    """(n, 3, size, size) uint8 as a test prepares them, and what they are of.

    Raises:
        UserError: not one picture can be read.
    """
    from ray_synth.training.decoder import decode_all
    from ray_synth.training.model_files import card_transform

    sources: list[tuple[str, Callable[[], list[Any]]]] = [
        ("test images", lambda: _test_images(weights.folder)),
        ("synthetic images", lambda: _stored_images(weights.folder)),
    ]
    if given:
        sources = [("pictures", lambda: [p.place for p in islice(find_pictures(given), CHECKED)])]
    problems = []
    for of, find in sources:
        try:
            found = find()[:CHECKED]
        except (UserError, OSError) as error:
            problems.append(f"{of}: {error}")
            continue
        transform = card_transform(weights.card)
        images, errors = decode_all(found, [0] * len(found), transform, MAX_PIXELS)
        good = [at for at in range(len(found)) if at not in errors]
        if good:
            return np.ascontiguousarray(images.numpy()[good]), of
        problems.append(f"{of}: {shortened(list(errors.values()), 1) or 'there are none'}")
    raise UserError(
        f"there is no picture to check the model on ({'; '.join(problems)}): name some with --check-on"
    )


def _test_images(folder: Folder) -> list[bytes]:
    """Of the run's own test set, evenly from its classes; nothing is fetched from a hub for it."""
    config = load_run_config(folder)
    source = config.data.test
    if source.format == "huggingface" and is_hub_id(str(source.path)):
        raise UserError(f"{source.path} is on a hub")
    index = load_index(source)
    few = select(index, max(1, CHECKED // max(1, len(index.class_names))), config.seed)
    return [row["image"] for row in read_index(few.take(np.arange(min(len(few), CHECKED))))]


def _stored_images(folder: Folder) -> list[bytes]:
    chosen = choose(scan(folder), rejected=False, limit=CHECKED)
    return [row["image"] for rows in read_chosen(folder, chosen, ["image"]) for row in rows]
