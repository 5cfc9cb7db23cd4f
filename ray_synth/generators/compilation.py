"""torch.compile of a pipeline's denoiser and decoder: when it pays, one actor of a node first, and back.

In: a loaded generator. Out: the same generator, faster after a warm-up; or eager again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ray_synth.config import GenerationConfig

log = logging.getLogger("ray_synth")
# A compiled pipeline costs one to two minutes at each actor's start, and saves a third of the time
# after it (docs/generation.md): below this many images a GPU actor it does not pay.
COMPILE_PAYS = 2_000
DENOISERS = ("unet", "transformer")


def wants_compile(
    config: GenerationConfig, *, num_images: int, on_gpu: bool
) -> bool | Literal["auto"]:
    """`generation.compile` for an actor that makes `num_images`: "auto" is off where it does not pay.

    Where it stays "auto", a compilation that fails is done without; True makes it an error.
    """
    if config.compile == "auto" and not (on_gpu and num_images >= COMPILE_PAYS):
        return False
    return config.compile


def compile_parts(pipeline: Any, *, dynamic: bool) -> Callable[[], None]:
    """Compile the denoiser and the decoder, at their first calls.

    Args:
        dynamic: the denoiser's inputs have several shapes, as where text is as long as its prompt.

    Returns:
        What takes it back.
    """
    import torch

    parts = [part for name in DENOISERS if (part := getattr(pipeline, name, None)) is not None]
    vae = getattr(pipeline, "vae", None)
    for part in parts:
        part.compile(dynamic=dynamic)
    if vae is not None:
        vae.decode = torch.compile(vae.decode, dynamic=False)

    def undo() -> None:
        for part in parts:
            part._compiled_call_impl = None
        if vae is not None:
            del vae.decode  # the method of its class again

    return undo


def first_on_this_node(key: str, work: Callable[[], None]) -> None:
    """Run `work`, alone for the first process of this node that has this key, then side by side.

    The first one leaves its kernels in the compiler's cache on disk, where the others read them:
    which takes seconds, and needs no turn.

    Args:
        key: of all that decides the kernels.
    """
    from filelock import FileLock
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    user = os.getuid() if hasattr(os, "getuid") else 0
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    # In the cache itself: where that is swept, the next process is the first one again.
    done = Path(cache_dir()) / f"ray-synth-{name}.done"
    with FileLock(Path(tempfile.gettempdir()) / f"ray-synth-{user}-compile-{name}.lock"):
        if not done.exists():
            work()
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()
            return
    work()
