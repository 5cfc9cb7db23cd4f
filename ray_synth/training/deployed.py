"""A trained model as others run it: pixels in, logits and probabilities out, its normalisation inside."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Deployed(nn.Module):
    """A classifier with the normalisation of its images.

    Args:
        model: a plain timm model; it is put into eval mode.
        mean, std: of each channel, of a range of 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, size, size) uint8 RGB to logits and probabilities, both (n, classes) float32."""
        logits = self.model((images.float() / 255 - self.mean) / self.std)
        return logits, logits.softmax(1)
