"""A grid of trials: their sources made, their models trained, and in the end tested.

Everything is known by digest in one workspace that all studies of a config share, so that nothing is made
or trained twice, whichever study asks for it, and also after a kill.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ray_synth.cluster.connection import runs_folder
from ray_synth.config import Config
from ray_synth.data.dataset import Index
from ray_synth.errors import UserError
from ray_synth.monitoring.mlflow_run import digest
from ray_synth.monitoring.progress import Bar, make_board, watch
from ray_synth.pipeline.run import Run
from ray_synth.preflight import Reach, check_budget
from ray_synth.preflight.check import fit, most_at_once
from ray_synth.preflight.demands import READ, demands
from ray_synth.preflight.packing import Demand
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.storage.folder import Folder
from ray_synth.studies.arm import ARMS, STUDIES, Trial
from ray_synth.studies.sources import make_sources, side_by_side
from ray_synth.training.brief import begin_brief, is_brief

log = logging.getLogger("ray_synth")
VALIDATION = "validation"
MOST_AT_A_TIME = 256
MOST_BYTES = 4 << 30  # of models that a process which tests them holds at a time


def workspace(config: Config) -> Folder:
    """Where all studies of a config keep what they share, and their results."""
    return runs_folder(config.runs_dir).child(config.name).child(STUDIES)


class Grid:
    """The trials of a study on a connected cluster.

    Test images are indexed when a run is opened, and read by `test` alone.

    Args:
        trials: as `trials_of` gives them.
        config: the config that the studies are of.
        reach: the cluster, before any of this was started.
    """

    def __init__(self, config: Config, trials: list[Trial], reach: Reach) -> None:
        self.config, self.folder, self.reach = config, workspace(config), reach
        self.arms = self.folder.child(ARMS)
        self.trials = [replace(trial, config=self._placed(trial.config)) for trial in trials]
        self.runs: dict[str, Run] = {}

    def _placed(self, config: Config) -> Config:
        """The config of a source, with its run directory in the workspace."""
        llm = config.meaning.llm
        if llm.cache_dir is None and self.folder.is_local:  # sources ask many of the same questions
            cached = llm.model_copy(update={"cache_dir": self.folder.path("answers")})
            meaning = config.meaning.model_copy(update={"llm": cached})
            config = config.model_copy(update={"meaning": meaning})
        return config.model_copy(update={"runs_dir": self.folder.child("sources").uri})

    def check(self) -> None:
        """Raises UserError where a source, or as many at once as asked, do not fit the cluster."""
        for config in {trial.source: trial.config for trial in self.trials}.values():
            check_budget(config, self.reach)
        self._check_parallel()

    def make_sources(self) -> None:
        """Inspect, resolve, plan and generate what the trials train on.

        Raises:
            UserError: as the pipeline's stages do.
        """
        configs: dict[str, Config] = {}
        for trial in self.trials:
            configs.setdefault(trial.source, trial.config)
        mixed = {trial.source for trial in self.trials if trial.mixed}
        self.runs = make_sources(
            configs, mixed, self.folder, at_a_time=self._room_for("generation")
        )

    def train(self) -> None:
        """Train every trial that is not trained yet."""
        todo = {
            trial.digest: trial
            for trial in self.trials
            if not self.arms.exists(f"models/{trial.digest}.json")
        }
        room = self._room_for("training")
        threads = max(1, (os.cpu_count() or 1) // room)
        if todo:
            log.info("%d trainings, %d at a time", len(todo), room)
        total = len({trial.digest for trial in self.trials})
        with Bar("trainings", total, "trials", done=total - len(todo)) as bar:

            def train(trial: Trial) -> None:
                self._train(trial, threads)
                bar.advance()

            side_by_side(train, list(todo.values()), room)

    def _train(self, trial: Trial, threads: int) -> None:
        import ray

        run = self.runs[trial.source]
        training = trial.config.training
        if trial.config.prompting.practice:
            rounds = ray.remote(num_cpus=0, max_retries=0)(_run_practice)
            ray.get(rounds.remote(run, self.arms, trial.digest))
            log.info("trained %s, seed %d, in rounds", trial.arm.label, trial.seed)
            return
        job = run.train_job(
            trial.digest,
            num_synthetic=_images(trial, run),
            config=training,
            seed=trial.seed,
            folder=self.arms,
            source=run.folder,
            num_threads=threads,
        )
        generation = run.generation_job() if trial.mixed else None
        # In a task, since Ray Train wants a main thread. Where workers train, it waits, and needs no
        # CPU of its own.
        if is_brief(job):
            ray.get(begin_brief(job, generation, trial.digest))
        else:
            train = ray.remote(num_cpus=0, max_retries=0)(_run_training)
            ray.get(train.remote(job, generation, trial.digest))
        log.info("trained %s, seed %d", trial.arm.label, trial.seed)

    def validate(self) -> None:
        """Test the trials on the validation images, which are not test images."""
        self._evaluate(VALIDATION, lambda run: {VALIDATION: run.validation})

    def test(self) -> None:
        """Test the trials; from here on test images are read."""
        self._evaluate("test", lambda run: run.tests)

    def test_more(self, kind: str, sets: Callable[[Run], dict[str, Index]]) -> None:
        """Test the trials on further sets, such as corrupted ones."""
        self._evaluate(kind, sets)

    def results(self, trial: Trial, kind: str = "test") -> dict[str, dict[str, dict[str, Any]]]:
        """Results by BN ("main" where there is one) and test set."""
        return self.arms.read_json(f"results/{trial.digest}.{kind}.json")

    def card(self, trial: Trial) -> dict[str, Any]:
        """What the trial's training left to say about itself."""
        return self.arms.read_json(f"models/{trial.digest}.json")

    def _evaluate(self, kind: str, sets: Callable[[Run], dict[str, Index]]) -> None:
        """Test what was not yet; trials that share their test sets share one pass over them."""
        groups: dict[str, dict[str, Trial]] = {}
        for trial in self.trials:
            if not self.arms.exists(f"results/{trial.digest}.{kind}.json"):
                found = sets(self.runs[trial.source])
                name = "".join(f"{key}{digest(index)}" for key, index in found.items())
                groups.setdefault(name, {})[trial.digest] = trial
        sizes = self.arms.child("models").stamps()
        for group in groups.values():
            for few in held_together(list(group.values()), sizes):
                self._evaluate_group(few, kind, sets)

    def _evaluate_group(
        self, trials: list[Trial], kind: str, sets: Callable[[Run], dict[str, Index]]
    ) -> None:
        from ray_synth.evaluation.predictor import evaluate

        run = self.runs[trials[0].source]
        bns, tested = ["main", "aux", "average"], sets(run)
        board = make_board()
        bar = Bar(f"evaluation of {len(trials)} models", sum(map(len, tested.values())), "images")
        with watch(board, {"tested": bar}):
            found, _ = evaluate(
                tested,
                folder=self.arms,
                arms=[trial.digest for trial in trials],
                config=run.config.evaluation.model_copy(update={"bns": bns}),
                class_names=run.train.class_names,
                max_pixels=run.config.data.max_pixels,
                board=board,
            )
        for trial in trials:
            results: dict[str, dict[str, Any]] = {}
            for (model, test_set), result in found.items():
                name, _, bn = model.partition(".")
                if name == trial.digest:
                    results.setdefault(bn or "main", {})[test_set] = result
            self.arms.write_json(f"results/{trial.digest}.{kind}.json", results)

    def _check_parallel(self) -> None:
        """Raises UserError where `studies.parallel` is more than the cluster holds at a time."""
        given = self.config.studies.parallel
        if given is None:
            return
        for stage in ("generation", "training"):
            parts, read = self._parts(stage)
            many = [replace(part, count=part.count * given) for part in parts]
            found = fit(stage, [*many, *read], self.reach)
            if found.problem:
                most = most_at_once(parts, read, self.reach, given)
                raise UserError(
                    f"studies.parallel {given} does not fit the cluster; Ray would wait forever:\n  "
                    f"{found.problem}\nThe most that fits: --set studies.parallel={most}"
                )

    def _parts(self, stage: str) -> tuple[list[Demand], list[Demand]]:
        """What each of several at a time asks for, and the read task that they share."""
        training = self.config.training.model_copy(update={"feed": "stored"})
        parts = demands(self.config.model_copy(update={"training": training}))[stage]
        most = training.max_workers
        parts = [replace(p, count=most) if p.what == "training.num_workers" else p for p in parts]
        return [p for p in parts if p.what != READ], [p for p in parts if p.what == READ]

    def _room_for(self, stage: str) -> int:
        """How many the cluster holds at a time; on a laptop, no more than it has cores."""
        if self.config.studies.parallel:
            return self.config.studies.parallel
        parts, read = self._parts(stage)
        logical = self.reach.count == 1 and not any(part.gpus for part in parts)
        most = (os.cpu_count() or 1) if logical else MOST_AT_A_TIME
        return most_at_once(parts, read, self.reach, most)


def held_together(
    trials: list[Trial], sizes: dict[str, tuple[int, int]], most: int = MOST_BYTES
) -> Iterator[list[Trial]]:
    """The trials, as many at a time as have weights of no more than `most` bytes together, at least one.

    Args:
        sizes: bytes (and more) of the files of models, by name.
    """
    few: list[Trial] = []
    held = 0
    for trial in trials:
        own = sum(size for name, (size, *_) in sizes.items() if name.startswith(trial.digest))
        if few and held + own > most:
            yield few
            few, held = [], 0
        few.append(trial)
        held += own
    if few:
        yield few


def _images(trial: Trial, run: Run) -> int:
    """Synthetic images that a trial trains on: fewer where so many were not retrieved."""
    wanted = round(trial.arm.scale * len(run.train))
    return min(wanted, len(PlanFile(run.folder))) if trial.arm.rival else wanted


def _run_training(job: Any, generation: Any, run_name: str) -> None:
    """The task that trains one trial; its checkpoints are of no use once it is done."""
    from ray_synth.training.trainer import run_training

    run_training(job, generation, run_name=run_name)
    checkpoints = job.folder.child("checkpoints")
    checkpoints.filesystem.delete_dir(checkpoints.path(run_name))


def _run_practice(run: Run, arms: Folder, digest: str) -> None:
    """The task that makes the rounds of one trial and trains on them; its models go to the arms."""
    from ray_synth.pipeline.steps import train_in_rounds

    train_in_rounds(run, None)
    card = run.folder.read_json("models/mixed.json")
    for bn in card["bns"]:
        data = run.folder.read_bytes(f"models/mixed.{bn}.safetensors")
        arms.write_bytes(f"models/{digest}.{bn}.safetensors", data)
    arms.write_json(f"models/{digest}.json", {**card, "arm": digest})
