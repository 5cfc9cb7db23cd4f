"""Sets a TrainJob going on the cluster: datasets, workers, storage, and the wait for its end.

The synthetic dataset is given to Ray Train as a callable, so that after a failure it is made again from
the plan and the store: what was generated is read back, not generated again.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ray_synth.cluster.signals import own_handlers
from ray_synth.config import TrainingConfig
from ray_synth.data.packing import addressable
from ray_synth.errors import UserError
from ray_synth.generation.maker import GenerationJob
from ray_synth.generation.stream import chunks_from, image_stream, stored_rows
from ray_synth.training.job import TrainJob
from ray_synth.training.loop import train_worker

log = logging.getLogger("ray_synth")
CONTROLLERS = 5  # of one training: Ray Train does not start a killed one again
COLUMNS = ["sample_id", "image", "class_index", "accepted"]


def check_recipe(config: TrainingConfig) -> None:
    """Build the classifier without its weights, and look up all that is named, of all arms.

    Raises:
        UserError: an unknown model, augmentation or optimizer, with the nearest ones; a recipe that
            cannot be a baseline.
    """
    import torch

    from ray_synth.training import recipe
    from ray_synth.training.augmentation import resolve_augmentation
    from ray_synth.training.dual_bn import check_dual_bn
    from ray_synth.training.published import check_recipe_batch, recipe_alone

    if "recipe" in config.baselines:
        check_recipe(recipe_alone(config))
    if text := check_recipe_batch(config):
        log.warning("%s", text)

    with torch.device("meta"):
        model = recipe.build_model(config.model, num_classes=2, model_kwargs=config.model_kwargs)
    if config.pretrained:
        recipe.check_pretrained(config.model)
    if config.checkpoint:
        recipe.check_checkpoint(model, config.checkpoint)
    if config.dual_bn:
        check_dual_bn(model)
    optimizer = recipe.build_optimizer(model, config.optimizer)
    recipe.build_schedule(optimizer, config.optimizer, steps=config.steps or 1000)
    resolve_augmentation(config.augment)


def run_training(
    job: TrainJob,
    generation: GenerationJob | None,
    *,
    run_name: str,
    in_process: bool = False,
) -> None:
    """Train one arm to its end; a run of the same name goes on from its newest checkpoint.

    Args:
        in_process: train in the calling process (Ray Train's local mode). No checkpoint outlives it: for
            short trainings, of which starting a worker and its helpers would take most of the time.

    Raises:
        ray.train.TrainingFailedError: when the workers failed more than `max_failures` times without
            a new checkpoint between.
        UserError: the loss was not finite.
    """
    config = job.config
    if not job.holds_real:
        job = replace(job, real=addressable(job.real, job.folder.child("real")))
    datasets: dict[str, Any] = {}
    if job.mixed and generation is not None:
        datasets.update(_streamed(job, generation))
        if config.feed == "stored" and not job.reads_store:
            job = replace(job, stored=stored_rows(generation, job.num_synthetic))
    result = _fit(job, run_name, datasets, in_process)
    error = (getattr(result, "return_value", None) or {}).get("error")
    if error:
        raise UserError(error)


def _fit(job: TrainJob, run_name: str, datasets: dict[str, Any], in_process: bool) -> Any:
    """Ray Train's result; where the controller of its workers is killed, another goes on."""
    import ray
    import ray.train.torch

    config = job.config
    options = ray.data.ExecutionOptions(preserve_order=config.feed != "live")
    reference = ray.put(job)
    for controller in range(CONTROLLERS):
        trainer = ray.train.torch.TorchTrainer(
            train_worker,  # type: ignore[arg-type]  # Ray 2.60 takes a return value
            # Once per node, not per worker: the index of a large set is a hundred megabytes.
            train_loop_config={"job": reference},
            scaling_config=ray.train.ScalingConfig(
                num_workers=0 if in_process else config.num_workers,  # type: ignore[arg-type]
                use_gpu=config.num_gpus > 0,
                resources_per_worker=_resources(config.num_cpus, config.num_gpus),
            ),
            run_config=_run_config(job, run_name),
            datasets=datasets,
            dataset_config=ray.train.DataConfig(execution_options=options),
        )
        try:
            with own_handlers():
                return trainer.fit()
        except SystemExit:  # what Ray Train makes of Ctrl-C, with code 0 as if all were done
            raise KeyboardInterrupt from None
        except ray.exceptions.ActorDiedError as error:
            if "TrainController" not in str(error) or controller == CONTROLLERS - 1:
                raise
            log.warning(
                "the process that controls the training workers was killed; training goes on from its "
                "newest checkpoint"
            )
    raise AssertionError("every turn returns, raises, or goes on")


def _run_config(job: TrainJob, name: str) -> Any:
    """Where Ray Train keeps the checkpoints of a run of this name, and when it gives up."""
    import ray.train

    from ray_synth.training.failures import ConsecutiveFailures

    checkpoints = job.folder.child("checkpoints")
    return ray.train.RunConfig(
        name=name,
        storage_path=checkpoints.path(),
        # Ray would not read all that the URI may say, and nothing of our environment.
        storage_filesystem=None if checkpoints.is_local else checkpoints.filesystem,
        # Ours gives up, by failures in a row. Announced losses of nodes are not limited.
        failure_config=ray.train.FailureConfig(max_failures=-1),
        callbacks=[ConsecutiveFailures(job.config.max_failures)],  # type: ignore[list-item]
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
    )


def _streamed(job: TrainJob, generation: GenerationJob) -> dict[str, Any]:
    """The `synthetic` dataset of a feed that trains on images while they are made.

    Of a later part the newest images come first. A live feed draws those before from the store; in
    lockstep they follow in the stream.
    """
    if job.config.feed == "stored":
        return {}
    others = job.config.feed == "lockstep"

    def stream() -> Any:
        chunks = chunks_from(generation, job.fresh_from, others=others) if job.fresh_from else None
        return image_stream(generation, chunks=chunks, columns=COLUMNS)

    return {"synthetic": stream}


def _resources(num_cpus: float, num_gpus: float) -> dict[str, float]:
    return {"CPU": num_cpus, "GPU": num_gpus} if num_gpus else {"CPU": num_cpus}
