"""Tiny-ImageNet's training photographs, a few large files instead of 100,000 small ones.

In: `data/tiny-imagenet-200/train`. Out: `work/photographs-*.npz`, read back one JPEG at a time.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jobs.embedded_models.settings import Settings

PHOTOGRAPHS_A_FILE = 25_000


def write_photographs(path: Path, photographs: Sequence[tuple[bytes, int]]) -> Path:
    """Writes encoded pictures and their labels to one npz.

    The arrays are `blob (bytes,) uint8`, the JPEG files end to end, `off (n + 1,) int64`, where
    each begins, and `lab (n,) int16`.
    """
    offsets = np.cumsum([0, *(len(jpeg) for jpeg, _ in photographs)], dtype=np.int64)
    blob = np.frombuffer(b"".join(jpeg for jpeg, _ in photographs), np.uint8)
    labels = np.array([label for _, label in photographs], np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, blob=blob, off=offsets, lab=labels)
    return path


def pack_photographs(settings: Settings) -> Path:
    """Packs Tiny-ImageNet's training folder; a label is a class's line in `wnids.txt`.

    Returns:
        The work folder, in which the `photographs-*.npz` lie.

    Raises:
        ValueError: the archive is not in `data`, or holds no photographs.
    """
    root = settings.input("tiny-imagenet-200", "Tiny-ImageNet's unpacked archive")
    class_ids = (root / "wnids.txt").read_text(encoding="utf-8").split()
    files = [
        (path, label)
        for label, class_id in enumerate(class_ids)
        for path in sorted((root / "train" / class_id / "images").glob("*.JPEG"))
    ]
    if not files:
        raise ValueError(f"No photographs in {root / 'train'}: unpack Tiny-ImageNet's archive.")
    for number, start in enumerate(range(0, len(files), PHOTOGRAPHS_A_FILE)):
        part = files[start : start + PHOTOGRAPHS_A_FILE]
        write_photographs(
            settings.work / f"photographs-{number:03}.npz",
            [(path.read_bytes(), label) for path, label in part],
        )
    return settings.work


class Photographs:
    """The packed photographs in order, as `(jpeg, label)`.

    Raises:
        ValueError: there are none in the folder.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("photographs-*.npz"))
        if not paths:
            raise ValueError(
                f"No photographs-*.npz in {folder}: run the stage 'photographs' first."
            )
        self.parts = []
        for path in paths:
            with np.load(path, allow_pickle=False) as arrays:
                self.parts.append((arrays["blob"], arrays["off"], arrays["lab"]))
        self.starts = np.cumsum([0, *(len(labels) for _, _, labels in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        blob, offsets, labels = self.parts[number]
        row = index - int(self.starts[number])
        return blob[offsets[row] : offsets[row + 1]].tobytes(), int(labels[row])
