"""Trainings so brief that starting workers would take most of their time: each in a task, on one CPU.

Ray's idle processes serve the next one, their imports done. No checkpoint outlives such a training: one
that is killed begins again. Of a training in parts, each leaves its state to the next.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from ray_synth.config import TrainingConfig
from ray_synth.training.job import TrainJob

BRIEF_STEPS = 1_000
BRIEF_PIXELS = 50_000_000  # of a baseline's real images: a minute or two of a small model on a CPU


def is_brief(job: TrainJob) -> bool:
    """Whether a training is over before its checkpoints would be of use: one CPU, all in memory."""
    in_memory = job.reads_store or not job.mixed
    return in_memory and _is_small(job.config, job.steps, len(job.real))


def is_brief_part(job: TrainJob) -> bool:
    """Whether a task trains this part of a training in rounds: also the one before has left its state."""
    return job.publish is not None and (not job.begin or job.resume is not None) and is_brief(job)


def is_brief_baseline(config: TrainingConfig, steps: int, num_real_images: int) -> bool:
    """Whether a run's baseline is so brief that a task trains it, without checkpoints."""
    pixels = steps * config.accumulate_steps * config.num_real * config.image_size**2
    return pixels <= BRIEF_PIXELS and _is_small(config, steps, num_real_images)


def _is_small(config: TrainingConfig, steps: int, num_real_images: int) -> bool:
    return (
        config.max_workers == 1
        and not config.num_gpus
        and steps <= BRIEF_STEPS
        and config.fits_in_memory(num_real_images)
    )


def begin_brief(job: TrainJob, generation: Any, run_name: str) -> Any:
    """Start a brief training in a task; the reference of its seconds."""
    import ray

    task = ray.remote(num_cpus=job.config.num_cpus)(_train)
    return task.remote(job, generation, run_name)


def train_briefly(job: TrainJob, run_name: str) -> None:
    """Train in a task, and wait for its end; another part may follow."""
    import ray

    job = replace(job, keep_state=job.end < job.steps)
    ray.get(begin_brief(job, None, run_name))


def _train(job: TrainJob, generation: Any, run_name: str) -> float:
    from ray_synth.training.trainer import run_training

    started = time.perf_counter()
    run_training(job, generation, run_name=run_name, in_process=True)
    return time.perf_counter() - started
