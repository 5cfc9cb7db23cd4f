"""The learner that steers generation: which one it is, and how unsure it is of images.

In: a folder with a model as training exports it, and images in 0..1 or as pictures. Out: logits and
entropies, which can be differentiated, and a digest of all that decides them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from ray_synth.config import PracticeGuidanceConfig, PracticeSelectConfig
from ray_synth.errors import UserError
from ray_synth.generators.protocol import digest_settings
from ray_synth.storage.classifiers import load_model
from ray_synth.storage.folder import Folder

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

log = logging.getLogger("ray_synth")
# A batch's shape is the same for all, so that an image's entropy does not depend on the others.
SCORED_AT_ONCE = 16
LEARNER = re.compile(r"(practice/learner-)(\d{3,})")
MODEL = re.compile(r"\w+")  # an arm, and a choice of BN
# What of a card decides the logits, beside the weights.
PREPARED_BY = ("model", "model_kwargs", "image_size", "crop_pct", "interpolation", "mean", "std")


@dataclass(frozen=True)
class Steering:
    """A learner, and what it steers; by value.

    Attributes:
        run: the run's folder.
        learner: the learner's folder in it: `practice/learner-001`.
        guidance: guide the sampler; None: not.
        select: keep the hardest of several candidates; None: not.
        arm, bn: which of the folder's models.
    """

    run: Folder
    learner: str
    guidance: PracticeGuidanceConfig | None = None
    select: PracticeSelectConfig | None = None
    arm: str = "mixed"
    bn: str = "main"

    @property
    def folder(self) -> Folder:
        return self.run.child(self.learner)

    @cached_property
    def card(self) -> dict[str, Any]:
        """The model's card.

        Raises:
            UserError: there is no such learner.
        """
        with self._there():
            return self.folder.read_json(f"models/{self.arm}.json")

    @cached_property
    def version(self) -> str:
        """A short hex digest of all that decides the learner's logits. Raises as `card`."""
        prepared = [self.card[name] for name in PREPARED_BY]
        with self._there():
            weights = self.folder.digest(f"models/{self.arm}.{self.bn}.safetensors")
        return digest_settings([weights, prepared])

    @contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(
                f"no learner in {self.folder.address()}: what it steered can be made again only while "
                "its folder is there"
            ) from None

    def fingerprint(self, made_by: str) -> str:
        """The generator's fingerprint with all that guides it: part of a guided image's id.

        Selection is no part of it: of what is made, it only decides which is kept.

        Args:
            made_by: the generator's own, which it is where nothing guides.
        """
        if self.guidance is None:
            return made_by
        return digest_settings([made_by, self.version, self.guidance.model_dump()])

    def facts(self) -> dict[str, Any]:
        """For a row's `generator`: which learner steered, and how."""
        said: dict[str, Any] = {
            "learner": self.learner,
            "arm": self.arm,
            "bn": self.bn,
            "version": self.version,
        }
        if self.guidance is not None:
            said["guidance"] = self.guidance.model_dump()
        if self.select is not None:
            said["factor"] = self.select.factor
        return said

    def newest(self) -> str:
        """The newest learner that is published after this one; itself where there is none."""
        found = LEARNER.fullmatch(self.learner)
        if found is None:
            return self.learner
        number = int(found[2])
        while self.run.exists(f"{found[1]}{number + 1:03d}/models/{self.arm}.json"):
            number += 1
        return f"{found[1]}{number:03d}"


def guided_by(run: Folder, facts: dict[str, Any], row: str) -> Steering | None:
    """What guided the image of a stored row; None where nothing did.

    Args:
        facts: of the row's `generator`. A row is input like any other.
        row: its id, for messages.

    Raises:
        UserError: no run writes such facts; or the learner is gone, or is another one now.
    """
    said = facts.get("steering")
    if not isinstance(said, dict) or "guidance" not in said:
        return None
    try:
        names = {"learner": LEARNER, "arm": MODEL, "bn": MODEL}
        for name, pattern in names.items():
            if not isinstance(said.get(name), str) or not pattern.fullmatch(said[name]):
                raise ValueError(f"{name} {said.get(name)!r:.80}")
        guidance = PracticeGuidanceConfig.model_validate(said["guidance"])
    except (ValidationError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"the stored row {row!r:.80} has no guidance of a run: {why}") from None
    steering = Steering(run, guidance=guidance, **{name: said[name] for name in names})
    if steering.version != said.get("version"):
        raise UserError(
            f"{row} was guided by a {steering.learner} with other weights than the folder has now: it "
            "cannot be made again"
        )
    return steering


def steer(generator: Any, steering: Steering | None, device: str) -> SteeringLearner | None:
    """Load the learner, and have it guide the generator where it is to; a stale one is named.

    Args:
        generator: loaded; with `guide`, if it is to be guided (`registry.check_guidance`).
        steering: None: nothing guides it any more.
        device: where generators of this config are.
    """
    if steering is None:
        if hasattr(generator, "guide"):
            generator.guide(None, None)
        return None
    newest = steering.newest()
    if newest != steering.learner:
        log.warning("images are steered by %s, and %s is newer", steering.learner, newest)
    learner = SteeringLearner(steering, device)
    if steering.guidance is not None:
        generator.guide(learner, steering.guidance)
    return learner


class SteeringLearner:
    """A loaded learner. Its weights are frozen, and nothing in it changes.

    Args:
        steering: names it.
        device: where it is to be.

    Attributes:
        side: pixels of the shorter side of what it looks at.

    Raises:
        UserError: it is gone, or not whole.
    """

    def __init__(self, steering: Steering, device: str) -> None:
        import torch

        card = steering.card
        model = load_model(steering.folder, steering.arm, steering.bn, card)
        module: Any
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # its fused gradient adds up in any order
        self.model = model.to(device).requires_grad_(False)
        self.device = device
        self.size, self.mode = int(card["image_size"]), card["interpolation"]
        self.side = round(self.size / card["crop_pct"])
        self._mean, self._std = (
            torch.tensor(card[name], dtype=torch.float32, device=device).view(1, 3, 1, 1)
            for name in ("mean", "std")
        )

    def logits(self, images: Tensor) -> Tensor:
        """(n, classes) float32 of (n, 3, height, width) in 0..1, prepared as a test prepares them."""
        return self._classified(self._seen(images.float()))

    def entropy(self, images: Tensor) -> Tensor:
        """(n,) float32 in 0..1: of the softmax of the logits, as a share of the most it can be."""
        return _entropy(self.logits(images))

    def entropies(self, images: Sequence[Image.Image | None]) -> list[float | None]:
        """The entropy of each picture, whatever others it comes with; None where there is none."""
        import torch

        there = [at for at, image in enumerate(images) if image is not None]
        found: list[float | None] = [None] * len(images)
        for start in range(0, len(there), SCORED_AT_ONCE):
            some = there[start : start + SCORED_AT_ONCE]
            padded = some + some[-1:] * (SCORED_AT_ONCE - len(some))
            with torch.inference_mode():
                batch = torch.cat([self._pixels(images[at]) for at in padded])
                values = _entropy(self._classified(batch)).tolist()
            for at, value in zip(some, values[: len(some)], strict=True):
                found[at] = value
        return found

    def _pixels(self, image: Any) -> Tensor:
        """(1, 3, size, size) float32 in 0..1 of one picture, which may be of any size."""
        import torch

        array = torch.from_numpy(np.array(image.convert("RGB"))).to(self.device)
        return self._seen(array.permute(2, 0, 1)[None].float() / 255)

    def _classified(self, seen: Tensor) -> Tensor:
        """(n, classes) float32 of (n, 3, size, size) in 0..1."""
        return self.model((seen - self._mean) / self._std).float()

    def _seen(self, images: Tensor) -> Tensor:
        """The centre square, its side as the model takes it."""
        height, width = images.shape[-2:]
        if height == width == self.size == self.side:
            return images
        shorter = min(height, width)
        rows, columns = (
            centre_rows(length, length * self.side // shorter, self.size, self.mode, images.device)
            for length in (height, width)
        )
        return rows @ images @ columns.T


def _entropy(logits: Tensor) -> Tensor:
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1) / math.log(max(2, logits.shape[1]))


def centre_rows(length: int, resized: int, kept: int, mode: str, device: Any) -> Tensor:
    """(kept, length) float32: what resizes a side with antialiasing, and keeps its middle.

    As a product of matrices a resize and its gradient are exact in any batch, on any device; those of
    torch add up in any order on a GPU.
    """
    import torch
    import torch.nn.functional as F

    unit = torch.eye(length, device=device)[None, None]
    size = (resized, length)
    matrix = F.interpolate(unit, size=size, mode=mode, antialias=True, align_corners=False)[0, 0]
    first = round((resized - kept) / 2)
    return matrix[first : first + kept]
