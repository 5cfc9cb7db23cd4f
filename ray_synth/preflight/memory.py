"""Does it fit in memory and on the disk? Estimates by stated formulas; only what is certain is refused.

    generation   weights + batch x 10 tensors of (the VAE's first channels, height, width)
    training     parameters x (4 + 4 + 4 per state of the optimizer [+ 4 for an average]) bytes
                 + batch x the outputs of all layers of one forward pass
    language     weights + a fifth
    per process  0.7 GB of host memory with torch, 0.9 GB with open_clip (measured), and its weights

How large a model is, model_sizes.py says; where that is not known, nothing is refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ray_synth.config import Config, GenerationConfig, TrainingConfig
from ray_synth.errors import UserError
from ray_synth.generation.packs import BYTES_PER_PIXEL
from ray_synth.generators.registry import filled
from ray_synth.generators.settings import family_of
from ray_synth.preflight.demands import Sizes, asks_for_contexts, fewest
from ray_synth.preflight.model_sizes import (
    classifier_size,
    frozen,
    model_folder,
    parameters_of,
    parts_parameters,
    vae_channels,
    weights_bytes,
)
from ray_synth.preflight.reach import GIB, Reach
from ray_synth.preflight.spread import spread_problem
from ray_synth.stages import STAGES
from ray_synth.storage.folder import Folder

# GiB of a GPU by Ray's name of its type; of types that come in two sizes the larger one.
GPU_GIB = {
    "K80": 12, "P4": 8, "P100": 16, "V100": 32, "T4": 16, "A10G": 24, "L4": 24, "L40S": 48,
    "A100": 80, "A100-40G": 40, "A100-80G": 80, "H100": 80, "H200": 141, "H20": 96, "B200": 192,
}  # fmt: skip
VAE_TENSORS = 10  # of full size that are alive at once while a batch is decoded
PROCESS = int(0.7e9)
PROCESS_WITH_CLIP = int(0.9e9)
ROW = 1_600  # bytes of a row besides its image: prompts, ids, an embedding
SURE = 0.25  # of the images' estimated size, that they surely take
OPTIMIZER_STATES = {"sgd": 1, "momentum": 1, "nesterov": 1, "lion": 1, "rmsprop": 1, "adafactor": 1}


@dataclass(frozen=True)
class Need:
    """Memory of one unit, in bytes.

    Attributes:
        what: the setting that asks for it.
        count: units at once, at the least.
        gpus: the share of a GPU that it has; 0: it runs on the host.
        sure: what it surely takes; 0 where that is not known.
        likely: what it will take by the formulas.
        fix: the settings that lower it.
    """

    what: str
    stage: str
    count: int
    gpus: float
    sure: int
    likely: int
    fix: str


@dataclass
class Findings:
    """What is certainly too small, what may be, and what was found, for people."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look(
    config: Config,
    reach: Reach,
    sizes: Sizes | None = None,
    stages: Collection[str] = STAGES,
    runs: Folder | None = None,
) -> Findings:
    """Memory of GPUs and hosts, object store and disk.

    Args:
        runs: where run directories lie; a local one is asked for its free space.
    """
    findings = Findings()
    needs = [need for need in memory_needs(config) if need.stage in stages]
    findings.warnings += unknown_models(config, stages)
    on_cpus = sorted({need.what for need in needs if not need.gpus})
    if reach.gpus and on_cpus:
        findings.notes.append(
            f"{', '.join(on_cpus)}: on CPUs, for num_gpus is 0 there, and the cluster has "
            f"{reach.gpus:g} GPUs"
        )
    for need in needs:
        if need.gpus:
            _look_at_gpus(need, reach, findings)
    if {"generation", "training"} & set(stages):
        _look_at_spread(config.generation, reach, findings)
    _look_at_hosts(needs, reach, findings)
    flying = bytes_in_flight(config)
    if {"generation", "training"} & set(stages) and 0 < reach.object_store < flying:
        findings.warnings.append(
            f"images in flight take about {_gib(flying)} of the object store, which has "
            f"{_gib(reach.object_store)}: Ray will write them to disk; lower "
            "generation.batch_size or generation.pool.max_size"
        )
    if runs is not None and runs.is_local and {"generation", "training"} & set(stages):
        place = Path(runs.path())
        while not place.is_dir():
            place = place.parent
        made = _bytes_in(Path(runs.path(config.name, "images")))
        disk = shutil.disk_usage(place)
        if disk.total:  # not a place such as /proc, which has no size
            _look_at_disk(config, sizes or Sizes(), disk.free, made, findings)
    return findings


def _look_at_gpus(need: Need, reach: Reach, findings: Findings) -> None:
    """A unit against the GPUs that have room for it."""
    sizes = {
        (node.accelerator, GPU_GIB[node.accelerator] * GIB)
        for node in reach.nodes
        if node.gpus >= min(need.gpus, 1) and node.accelerator in GPU_GIB
    }
    if not sizes or len(sizes) < len({n.accelerator for n in reach.nodes if n.gpus}):
        findings.notes.append(f"{need.what}: about {_gib(need.likely)} of GPU memory each")
        return
    kind, largest = max(sizes, key=lambda item: item[1])
    room = int(largest * need.gpus)
    text = (
        f"{need.what} needs {{}} of GPU memory, and {need.gpus:g} of "
        f"{'an' if kind[0] in 'AHL' else 'a'} {kind} has {_gib(room)}; {need.fix}"
    )
    if need.sure > room:
        findings.problems.append(text.format(f"at least {_gib(need.sure)}"))
    elif need.likely > min(size for _, size in sizes) * need.gpus:
        findings.warnings.append(text.format(f"about {_gib(need.likely)}"))


def _look_at_spread(generation: GenerationConfig, reach: Reach, findings: Findings) -> None:
    """The parts of a generator on several GPUs, against one GPU of the largest type."""
    kinds = {node.accelerator for node in reach.nodes if node.gpus >= generation.num_gpus}
    folder = model_folder(generation.model, generation.revision)
    if generation.num_gpus <= 1 or generation.generator != "diffusers" or folder is None:
        return
    if not kinds or not kinds <= GPU_GIB.keys():
        return
    kind = max(kinds, key=GPU_GIB.__getitem__)
    size = _bytes(generation.dtype, generation.num_gpus)
    parts = {name: size * numbers for name, numbers in parts_parameters(folder).items()}
    problem = spread_problem(parts, int(generation.num_gpus), GPU_GIB[kind] * GIB, kind)
    if problem:
        findings.problems.append(problem)


def _look_at_hosts(needs: list[Need], reach: Reach, findings: Findings) -> None:
    """All processes of a stage against the memory of all nodes; one against the largest node."""
    if not reach.nodes or any(not node.memory for node in reach.nodes):
        return
    whole = sum(node.count * node.memory for node in reach.nodes)
    largest = max(node.memory for node in reach.nodes)
    for need in needs:
        if not need.gpus and need.sure > largest:
            findings.problems.append(
                f"{need.what} needs at least {_gib(need.sure)} of memory, the largest node has "
                f"{_gib(largest)}; {need.fix}"
            )
    for stage in dict.fromkeys(need.stage for need in needs):
        likely = sum(
            need.count * (PROCESS if need.gpus else need.likely)
            for need in needs
            if need.stage == stage
        )
        if likely > whole:
            findings.warnings.append(
                f"{stage} takes about {_gib(likely)} of memory, all nodes have {_gib(whole)}"
            )


def _look_at_disk(config: Config, sizes: Sizes, free: int, made: int, findings: Findings) -> None:
    """Images, plan, checkpoints and models against what is free; `made` bytes of images are there."""
    images, rest = disk_needs(config, sizes)
    findings.notes.append(f"disk: about {_gib(images + rest)} in all, {_gib(free)} are free")
    missing = max(0, images - made) + rest
    if max(0, SURE * images - made) + rest > free:
        findings.problems.append(
            f"the run needs {_gib(missing)} of disk (images {_gib(images)}, of which {_gib(made)} are "
            f"there; checkpoints and the rest {_gib(rest)}), {_gib(free)} are free: free some, give "
            "another runs_dir, or make fewer images (prompting.multiplier)"
        )
    elif missing > free:
        findings.warnings.append(f"the run may need {_gib(missing)} of disk, {_gib(free)} are free")


def bytes_in_flight(config: Config) -> int:
    """Of encoded images between the makers and those who use them: four batches per maker."""
    generation = config.generation
    batch = generation.batch_size if isinstance(generation.batch_size, int) else 64
    return 4 * generation.pool.max_size * batch * image_bytes(config)


def image_bytes(config: Config) -> int:
    """Bytes per image's row, encoded, as photographs of the format take."""
    generation = config.generation
    pixels = _pixels(generation)
    return int(pixels * BYTES_PER_PIXEL[generation.encoding["image_format"]] + ROW)


def _one_by_one(generation: GenerationConfig) -> bool:
    """Whether the model makes one image at a time, whatever the batch size; no where it is unknown."""
    try:
        return generation.generator == "diffusers" and family_of(generation).alone
    except UserError:
        return False


def _pixels(generation: GenerationConfig) -> int:
    """Of an image; of most models' where the one that is named cannot be read from here."""
    try:
        generation = filled(generation)
    except UserError:
        return 1024 * 1024
    return (generation.width or 1024) * (generation.height or 1024)


def disk_needs(config: Config, sizes: Sizes) -> tuple[int, int]:
    """Bytes of the images, and of plan, checkpoints (two are kept, one is being written) and models."""
    training, synthetic = config.training, sizes.synthetic(config) or 0
    images = synthetic * image_bytes(config)
    parameters, _ = classifier_size(training.model, frozen(training), sizes.classes or 1000)
    arms = 1 + len(training.baselines)
    kept = arms * 3 * (4 * parameters + _state_bytes(training, parameters))
    exported = 4 * parameters * (3 if training.dual_bn else 1) * arms
    return images, synthetic * 400 + kept + exported


def memory_needs(config: Config) -> list[Need]:
    """What each kind of unit takes."""
    llm, generation, training = config.meaning.llm, config.generation, config.training
    needs = []
    served = [
        *(["meaning"] if config.meaning.enabled else []),
        *(["plan"] if asks_for_contexts(config) else []),
    ]
    for stage in served:
        if llm.backend == "transformers":
            weights = weights_bytes(llm.model, llm.revision, _bytes(llm.dtype, llm.num_gpus))
            base = 0 if llm.num_gpus else PROCESS
            needs.append(
                Need(
                    "meaning.llm", stage, fewest(llm.replicas), llm.num_gpus, weights,
                    int(1.2 * weights) + base,
                    "take a smaller meaning.llm.model, or more meaning.llm.num_gpus to spread it",
                )
            )  # fmt: skip
        clip = config.meaning.clip
        if not clip.num_gpus:
            needs.append(
                Need(
                    "meaning.clip", stage, fewest(clip.replicas), 0, 0, PROCESS_WITH_CLIP,
                    "take a smaller meaning.clip.model",
                )
            )  # fmt: skip
    size = _bytes(generation.dtype, generation.num_gpus)
    weights = 0
    if generation.generator == "diffusers" and not generation.offload:
        weights = weights_bytes(generation.model, generation.revision, size)
    batch = generation.batch_size if isinstance(generation.batch_size, int) else 1
    batch = 1 if _one_by_one(generation) else batch
    pixels = _pixels(generation)
    decoded = batch * VAE_TENSORS * vae_channels(generation.model) * pixels * size
    base = 0 if generation.num_gpus else PROCESS_WITH_CLIP
    likely = weights + (decoded if generation.generator == "diffusers" else 0) + base
    maker = (
        generation.pool.min_size, generation.num_gpus, weights, likely,
        "lower generation.batch_size (or 'auto'), take half precision or generation.offload",
    )  # fmt: skip
    needs.append(Need("generation", "generation", *maker))
    if training.feed != "stored":
        needs.append(Need("generation", "training", *maker))
    parameters, outputs = classifier_size(training.model, frozen(training), 1000)
    sure = 4 * parameters + 4 * parameters + _state_bytes(training, parameters)
    kept = outputs * training.batch_size * _bytes(training.dtype, training.num_gpus)
    needs.append(
        Need(
            "training", "training", training.min_workers, training.num_gpus, sure,
            sure + kept + (0 if training.num_gpus else PROCESS),
            "lower training.batch_size (and raise accumulate_steps), or train in bfloat16",
        )
    )  # fmt: skip
    return needs


def _state_bytes(training: TrainingConfig, parameters: int) -> int:
    """Of the optimizer, and of an average of the weights."""
    states = OPTIMIZER_STATES.get(training.optimizer.name.lower(), 2)
    return 4 * parameters * (states + (training.ema_decay is not None))


def unknown_models(config: Config, stages: Collection[str]) -> list[str]:
    """Lines on the models of these stages whose size nobody here can tell."""
    llm, generation = config.meaning.llm, config.generation
    asked = {"meaning": config.meaning.enabled, "plan": asks_for_contexts(config)}
    models = []
    if llm.backend == "transformers" and any(asked[s] for s in asked if s in stages):
        models.append(("meaning.llm.model", llm.model, llm.revision))
    if generation.generator == "diffusers" and {"generation", "training"} & set(stages):
        models.append(("generation.model", generation.model, generation.revision))
    return [
        f"{what} {model}: its size is not known ({why}), so nothing says yet whether it fits; once it is "
        "here, a start that does not fit is refused"
        for what, model, revision in models
        if isinstance(why := parameters_of(model, revision), str)
    ]


def _bytes(dtype: str, gpus: float) -> int:
    """Bytes per number; "auto" is half precision on GPUs."""
    if dtype == "auto":
        return 2 if gpus else 4
    return 4 if dtype == "float32" else 2


def _bytes_in(folder: Path) -> int:
    """Bytes of the files right in a folder."""
    if not folder.is_dir():
        return 0
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())


def _gib(amount: float) -> str:
    return f"{amount / GIB:.1f} GiB" if amount >= GIB / 10 else f"{amount / 2**20:.0f} MiB"
