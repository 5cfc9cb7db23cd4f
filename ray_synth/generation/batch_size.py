"""How many images fit in an actor at once: found by making one and then a few, where it will be done.

The answer is kept with the store: all actors, and every continuation of a run, use the same batch shape,
and so make the same pixels.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from ray_synth.config import GenerationConfig
from ray_synth.errors import UserError
from ray_synth.generation.store import ImageStore
from ray_synth.storage.damage import damaged

log = logging.getLogger("ray_synth")
RECORD = "batch.json"
LARGEST = 64  # larger batches gain nothing: the device is full long before
# Of models that make one image at a time: rows that are kept and counted as done together.
ONE_BY_ONE = 8
RESERVE = 0.1  # of the memory, left for what the probe did not see


def fit_batch(used: dict[int, int], available: int) -> int:
    """The largest power of two of images that fits.

    Args:
        used: batch size -> bytes at the peak, for two sizes.
        available: bytes in all that the actor may use.

    Raises:
        UserError: not even one image fits.
    """
    (small, least), (large, more) = sorted(used.items())
    each = max(1, (more - least) // (large - small))
    base = least - small * each
    room = int(available * (1 - RESERVE)) - base
    if room < each:
        raise UserError(
            f"one image needs {(base + each) / 2**30:.1f} GiB of {available / 2**30:.1f} GiB: too much "
            "for the device; take a smaller model or size, half precision, or generation.offload"
        )
    fits = min(room // each, LARGEST)
    return 1 << (int(fits).bit_length() - 1)


def recorded_batch_size(config: GenerationConfig, store: ImageStore) -> int | None:
    """The batch size of the config, or, where that is "auto", of the store; None before the probe."""
    if config.batch_size != "auto":
        return config.batch_size
    if not store.folder.exists(RECORD):
        return None
    found = store.folder.read_json(RECORD)
    size = found.get("batch_size") if isinstance(found, dict) else None
    if type(size) is not int or not 1 <= size <= LARGEST:
        raise damaged(store.folder.address(RECORD), f"its batch_size is {size!r:.80}")
    return size


def find_batch_size(config: GenerationConfig, store: ImageStore) -> int:
    """The batch size of a store: as recorded, or found by a probe on the cluster and recorded."""
    known = recorded_batch_size(config, store)
    if known is not None:
        return known
    import ray

    probe = ray.remote(num_cpus=config.num_cpus, num_gpus=config.num_gpus, max_retries=3)(measure)
    found = ray.get(probe.remote(config))
    size = batch_of(found)
    log.info("batches of %d images fit in memory", size)
    store.folder.write_json(RECORD, {"batch_size": size, **found})
    return size


def batch_of(found: dict[str, Any]) -> int:
    """The batch size by what `measure` found. Raises UserError as `fit_batch`."""
    size = fit_batch({1: found["one"], 4: found["four"]}, found["available"])
    if found["alone"]:
        return ONE_BY_ONE
    return size if found["at_once"] == 4 else found["at_once"]  # not even four fitted


def measure(config: GenerationConfig) -> dict[str, Any]:
    """Peak bytes for batches of one and of four, and the bytes that one actor may use.

    Besides, how many of the four were made at once, and whether the model makes them one by one.
    """
    import torch

    from ray_synth.data.images import gray_image
    from ray_synth.device import pick_device
    from ray_synth.generators.registry import generator_class

    on_gpu = pick_device(config.device).startswith("cuda")
    row = {"prompt": "a photo", "negative_prompt": "", "seed": 0, "class_name": "", "meaning": ""}
    guide = config.reference if config.ip_adapter is not None else None
    used: dict[str, Any] = {}
    for name, size in (("one", 1), ("four", 4)):
        probed = config.model_copy(
            update={"batch_size": size, "compile": False, "reference": guide}
        )
        generator = generator_class(config.generator)(probed)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        generator.generate([{**row, "class_index": 0, "reference_image": gray_image()}] * size)
        used[name] = _peak_bytes(on_gpu)
        used["at_once"] = getattr(generator, "batch_size", size)
        used["alone"] = getattr(generator, "alone", False)
        del generator
    kind = torch.cuda.get_device_name() if on_gpu else "cpu"
    return {**used, "available": _available_bytes(config, on_gpu), "kind": kind}


def _peak_bytes(on_gpu: bool) -> int:
    import resource

    import torch

    if on_gpu:
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _available_bytes(config: GenerationConfig, on_gpu: bool) -> int:
    import psutil
    import torch

    if on_gpu:
        total = torch.cuda.mem_get_info()[1]
        return int(total * min(1.0, config.num_gpus or 1.0))
    return psutil.virtual_memory().available // config.pool.max_size
