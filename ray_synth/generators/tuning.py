"""DreamBooth-LoRA: a diffusers model tuned on real images, by peft. No Ray here.

In: real images with their classes, and a prompt for each class. Out: a folder that
`generation.adapters` takes: the LoRA, and a card that says of which images and settings it is.

The image, noise and timestep of every step follow from the seed and the step's number alone, so that a
tuning that was stopped goes on from its checkpoint to the same weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ray_synth.config import GenerationConfig
from ray_synth.data.dataset import Index
from ray_synth.data.images import decode_image
from ray_synth.data.sources import read_rows
from ray_synth.device import pick_device, pick_dtype
from ray_synth.errors import UserError
from ray_synth.generators.adapter_files import FILES
from ray_synth.generators.adapters import require_peft, wear
from ray_synth.generators.image_to_image import prepare_references
from ray_synth.generators.loading import load_pipeline, read_index, silent
from ray_synth.generators.settings import filled, image_size
from ray_synth.generators.tuning_card import TuningJob, tuning_card, tuning_record
from ray_synth.generators.tuning_loss import flow_loss, noise_loss

log = logging.getLogger("ray_synth")
UNETS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
FLOWS = ("StableDiffusion3Pipeline",)
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]  # of attention, as diffusers' own scripts have it
MOST_GRADIENT = 1.0  # the norm that gradients are clipped to
LOG_EVERY = 10
WEIGHTS = FILES["lora"]
RECORD = "card.json"  # in the folder, last: what it is of; it says that the tuning is done
CHECKPOINT = "checkpoint"
STATE = "state.safetensors"


def check_tuning(config: GenerationConfig) -> None:
    """Raises UserError where the model cannot be tuned here, by its index alone."""
    require_peft()
    if config.generator != "diffusers":
        raise UserError(
            f"tune works on diffusers models, and generation.generator is {config.generator!r}"
        )
    if config.num_gpus > 1:
        raise UserError(
            f"tune takes one GPU, and generation.num_gpus is {config.num_gpus:g}: set it to 1"
        )
    named = str(read_index(config).get("_class_name"))
    if named not in (*UNETS, *FLOWS):
        raise UserError(
            f"tune takes {', '.join((*UNETS, *FLOWS))}, and {config.model!r} is a {named}: tune it with "
            "its own tools, and name the LoRA in generation.adapters"
        )


def tune(job: TuningJob) -> dict[str, Any]:
    """Tune, and leave the adapter in the job's folder; what `RECORD` says.

    Raises:
        UserError: as loading the pipeline does, or the loss is no number.
    """
    import torch

    denoiser, loss_of = _prepared(job)
    parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=job.tuning.learning_rate)
    begun = _resume(job, parameters, optimizer)
    losses: list[float] = begun.get("losses", [])
    drawn = _Drawn(job)
    drawn.bad |= set(begun.get("bad", []))
    for step in range(len(losses), job.tuning.steps):
        losses.append(_step(job, step, drawn, loss_of, optimizer))
        done = step + 1
        if job.board is not None:
            job.board.put.remote("tuned", done)
        if done % LOG_EVERY == 0 or done == job.tuning.steps:
            mean = float(np.mean(losses[-LOG_EVERY:]))
            log.info("tuning: step %d of %d, loss %.4f", done, job.tuning.steps, mean)
        if done % job.tuning.checkpoint_every == 0 and done < job.tuning.steps:
            _save_state(job, parameters, optimizer, losses, drawn.bad)
    return _finish(job, denoiser, losses, drawn.bad)


def _prepared(job: TuningJob) -> tuple[Any, Callable[..., Any]]:
    """The denoiser with a fresh LoRA, and the function that gives the loss of some images."""
    import torch
    from peft import LoraConfig

    config = filled(job.generation)
    device = pick_device(config.device)
    if device == "cpu" and config.num_threads:
        torch.set_num_threads(config.num_threads)
    # In float16 gradients of a LoRA vanish; on CPUs bfloat16 gains nothing.
    half = pick_dtype(config.dtype, device) is torch.bfloat16 and device != "cpu"
    pipeline = load_pipeline(config, torch.bfloat16 if half else torch.float32)
    if config.adapters:
        wear(pipeline, config, torch.float32)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).to(device)
    name = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    denoiser = getattr(pipeline, name)
    torch.manual_seed(job.seed)
    rank = job.tuning.rank
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS), "tuned")
    for weights in denoiser.parameters():
        if weights.requires_grad:
            weights.data = weights.data.float()
    if device != "cpu":
        denoiser.train()
        denoiser.enable_gradient_checkpointing()
    loss = flow_loss if name == "transformer" else noise_loss
    return denoiser, loss(pipeline, config, job.captions, device)


def _step(job: TuningJob, step: int, drawn: _Drawn, loss_of: Any, optimizer: Any) -> float:
    """One optimizer step; its loss."""
    import torch

    pixels, classes = drawn.batch(step)
    if not classes:
        raise UserError(
            f"tune: none of {job.tuning.batch_size} training images can be decoded (such as "
            f"{next(iter(drawn.bad))})"
        )
    seed = int.from_bytes(hashlib.sha256(b"%d:%d" % (job.seed, step)).digest()[:6], "big")
    loss = loss_of(pixels, classes, torch.Generator().manual_seed(seed))
    if not torch.isfinite(loss):
        raise UserError(
            f"tune: the loss of step {step + 1} is not a number: lower tuning.learning_rate "
            f"({job.tuning.learning_rate:g})"
        )
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], MOST_GRADIENT)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


class _Drawn:
    """The images of each step, in an order by the seed that goes through all before one comes again.

    Attributes:
        bad: names of those that cannot be decoded: left out.
    """

    def __init__(self, job: TuningJob) -> None:
        self.job, self.bad = job, set[str]()
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, round_number: int) -> np.ndarray:
        rng = np.random.default_rng([self.job.seed, round_number])
        return rng.permutation(len(self.job.images))

    def batch(self, step: int) -> tuple[Any, list[int]]:
        """(n, 3, height, width) float32 in -1..1, and the class indices."""
        import torch

        index, size = self.job.images, self.job.tuning.batch_size
        pictures, classes = [], []
        for place in range(step * size, (step + 1) * size):
            round_number, at = divmod(place, len(index))
            row = int(self.order(round_number)[at])
            try:
                pictures.append(decode_image(_read(index, row), max_pixels=self.job.max_pixels))
            except UserError as error:
                name = index.image_id(row)
                if name not in self.bad:
                    log.warning("set aside %s: %s", name, error)
                self.bad.add(name)
                continue
            classes.append(int(index.label[row]))
        width, height = image_size(self.job.generation)
        fitted = prepare_references(pictures, width=width, height=height)
        pixels = np.stack([np.asarray(picture) for picture in fitted]) if fitted else np.zeros(0)
        return torch.from_numpy(pixels).float().movedim(-1, 1 if fitted else 0) / 127.5 - 1, classes


def _read(index: Index, row: int) -> bytes:
    shard = index.shards[index.shard[row]]
    if shard.addressable:
        return index.locate(row).read()
    ((_, data),) = read_rows(shard, [int(index.row[row])])
    return data


# The checkpoint: tensors alone, so that nothing in it is run.


def _save_state(
    job: TuningJob, parameters: dict[str, Any], optimizer: Any, losses: list[float], bad: set[str]
) -> None:
    import torch
    from safetensors.torch import save

    facts = {"identity": job.identity, "losses": losses, "bad": sorted(bad)}
    tensors = {"facts": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)}
    for name, weights in parameters.items():
        tensors[f"weights {name}"] = weights.detach()
        for key, value in optimizer.state[weights].items():
            tensors[f"{key} {name}"] = value
    kept = {name: value.cpu().contiguous() for name, value in tensors.items()}
    job.folder.child(CHECKPOINT).write_bytes(STATE, save(kept))


def _resume(job: TuningJob, parameters: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Go on from the checkpoint, where there is one of the same tuning; what it says."""
    from safetensors.torch import load

    folder = job.folder.child(CHECKPOINT)
    if not folder.exists(STATE):
        return {}
    held = load(folder.read_bytes(STATE))
    facts = json.loads(held.pop("facts").numpy().tobytes())
    if facts["identity"] != job.identity:
        return {}
    states = {}
    for at, (name, weights) in enumerate(parameters.items()):
        weights.data.copy_(held.pop(f"weights {name}"))
        keys = [key for key in held if key.partition(" ")[2] == name]
        states[at] = {key.partition(" ")[0]: held[key] for key in keys}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    log.info("tuning goes on from step %d", len(facts["losses"]))
    return facts


def _finish(job: TuningJob, denoiser: Any, losses: list[float], bad: set[str]) -> dict[str, Any]:
    """Write the adapter, its card, and last its record."""
    import diffusers
    from peft.utils import get_peft_model_state_dict

    named = str(read_index(job.generation)["_class_name"])
    part = "transformer" if named in FLOWS else "unet"
    weights = get_peft_model_state_dict(denoiser, adapter_name="tuned")
    header = denoiser.peft_config["tuned"].to_dict()
    header["target_modules"] = sorted(header["target_modules"])
    with tempfile.TemporaryDirectory() as place, silent():
        getattr(diffusers, named).save_lora_weights(
            place,
            **{
                f"{part}_lora_layers": {name: value.cpu() for name, value in weights.items()},
                f"{part}_lora_adapter_metadata": header,
            },
        )
        job.folder.write_bytes(WEIGHTS, _in_order((Path(place) / WEIGHTS).read_bytes()))
    record = tuning_record(job, losses, bad)
    job.folder.write_bytes("README.md", tuning_card(record).encode())
    job.folder.write_json(RECORD, record)
    job.folder.child(CHECKPOINT).delete(STATE)
    return record


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its header in order: the library writes the same one in any order.

    Its format: 8 bytes for the header's length, the header as JSON, the tensors.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
