"""What every stage of the recipe is told, and the files it finds and leaves.

In: two folders and a time budget. Out: one `Settings`, handed to each stage.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch


class MissingInputError(ValueError):
    """A file that has to be downloaded, or that an earlier stage has to write, is not there."""


@dataclass(frozen=True)
class Settings:
    """Folders, time and size of one run of the recipe.

    Attributes:
        work: where stages write and later stages read.
        data: what is downloaded by hand; its layout is described in `__main__`.
        minutes: training time of each training stage.
        smoke: four steps per stage on a few pictures, to see that everything fits together.
        workers: processes that draw pictures; 1 draws in this process.
    """

    work: Path
    data: Path
    minutes: float = 3.0
    smoke: bool = False
    workers: int = field(default_factory=lambda: max(1, (os.cpu_count() or 1) - 1))

    @property
    def device(self) -> str:
        """`cuda` when there is a GPU, else `cpu`."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def compiles(self) -> bool:
        """Whether `torch.compile` pays: a real run on a GPU."""
        return self.device == "cuda" and not self.smoke

    def batch(self, full: int, smoke: int) -> int:
        """The batch size of a stage."""
        return smoke if self.smoke else full

    def input(self, name: str, what: str) -> Path:
        """A path under `data`, which must exist.

        Raises:
            MissingInputError: it does not; the message says what belongs there.
        """
        path = self.data / name
        if not path.exists():
            raise MissingInputError(f"{path} is missing: put {what} there.")
        return path

    def output_of(self, stage: str, name: str) -> Path:
        """A path under `work` that `stage` should have written.

        Raises:
            MissingInputError: the stage has not run yet.
        """
        path = self.work / name
        if not path.exists():
            raise MissingInputError(f"{path} is missing: run the stage {stage!r} first.")
        return path


def stable_seed(*parts: object) -> int:
    """A 32-bit seed from what is being made, the same in every process and on every machine.

    (Python's own `hash` of a string changes from one process to the next.)
    """
    text = ":".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "big")


def autocast(device: str) -> torch.autocast:
    """bfloat16 autocast on a GPU, nothing on a CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def prefer_speed(device: str) -> None:
    """Turns on the fast float32 paths of a GPU; harmless without one."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = device == "cuda"
