"""What a run directory remembers: which stages are done, from which inputs, in how many seconds.

A stage that is done and whose inputs are unchanged is skipped; changed inputs are an error that says
what changed, never a silent redo or a mixture of old and new.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from ray_synth.config import Config
from ray_synth.errors import UserError
from ray_synth.monitoring.mlflow_run import flatten
from ray_synth.monitoring.progress import under_way
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
STAGES = ("data", "meaning", "plan", "quality", "generation", "training", "evaluation")
# Settings that decide how fast a stage runs and where, not what comes out of it.
HOW = {"num_cpus", "num_gpus", "num_threads", "replicas", "pool", "max_batch_size", "batch_size",
       "decode_workers", "reservoir_mb", "autoscaling", "cache_dir", "cache_images", "timeout_s",
       "max_retries", "requests_per_minute", "api_key_env"}  # fmt: skip


def stage_inputs(config: Config, generator: str) -> dict[str, dict[str, Any]]:
    """For each stage, the settings that its result depends on, those of earlier stages included.

    Args:
        generator: fingerprint of the image generator.
    """
    values = config.model_dump(mode="json")
    data = values["data"]
    own: dict[str, dict[str, Any]] = {
        "data": {
            "seed": values["seed"],
            "data": {
                key: data[key] for key in ("train", "validation", "class_names", "max_pixels")
            },
        },
        "meaning": {"meaning": _without(values["meaning"], HOW)},
        "plan": {
            "prompting": values["prompting"],
            "generator": generator,
            "generation": {"reference": values["generation"]["reference"]},
        },
        "quality": {"generation": {"checks": values["generation"]["checks"]}},
        "generation": {},
        "training": {
            "training": _without(values["training"], HOW - {"batch_size"} | {"max_failures"})
        },
        "evaluation": {
            "evaluation": _without(values["evaluation"], HOW | {"num_actors"}),
            "data": {key: data[key] for key in ("test", "ood")},
        },
    }
    inputs: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for stage in STAGES:
        if stage == "training":  # a live feed trains while images are made: it follows the plan
            flat = dict(inputs["generation"])
        flat = {**flat, **flatten(own[stage])}
        inputs[stage] = flat
    return inputs


def _without(values: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in keys
    }


class StageLog:
    """The records `stages/<stage>.json` of a run directory."""

    def __init__(self, folder: Folder, inputs: dict[str, dict[str, Any]]) -> None:
        self.folder, self.inputs = folder, inputs
        self._again: set[str] = set()

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left; None where it is still to do."""
        name = f"stages/{stage}.json"
        done = stage not in self._again and self.folder.exists(name)
        return self.folder.read_json(name) if done else None

    def check(self, force_stage: str | None = None) -> None:
        """Compare all finished stages with the current inputs; nothing is written.

        Args:
            force_stage: do this stage and all that follow it again.

        Raises:
            UserError: a finished stage had other inputs; names them.
        """
        if force_stage:
            if force_stage not in STAGES:
                raise UserError(f"unknown stage {force_stage!r}: one of {', '.join(STAGES)}")
            self._again = set(STAGES[STAGES.index(force_stage) :])
        for stage in STAGES:
            record = self.record(stage)
            if record is None:
                continue
            changes = changed(record["inputs"], self.inputs[stage])
            if changes:
                raise UserError(
                    f"{self.folder.address()} holds a finished {stage} stage with other settings:\n  "
                    + "\n  ".join(changes)
                    + f"\nGive the run a new name, or redo it with --force-stage {stage}."
                )

    def forget(self) -> None:
        """Delete the records of the stages that are to be done again."""
        for stage in self._again:
            self.folder.delete(f"stages/{stage}.json")
        self._again = set()

    def run(self, stage: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a stage unless it is done; its result (small, JSON) either way."""
        record = self.record(stage)
        if record is not None:
            log.info("%s: done before", stage, extra={"stage": stage})
            return record["result"]
        started = time.perf_counter()
        with under_way(self.folder.uri, stage):
            result = work()
        seconds = time.perf_counter() - started
        self.folder.write_json(
            f"stages/{stage}.json",
            {"inputs": self.inputs[stage], "seconds": seconds, "result": result},
        )
        log.info("%s: %.1f s", stage, seconds, extra={"stage": stage})
        return result

    def seconds(self) -> dict[str, float]:
        """Seconds that each finished stage took."""
        records = {stage: self.record(stage) for stage in STAGES}
        return {stage: record["seconds"] for stage, record in records.items() if record}

    def digest(self, stage: str) -> str:
        text = json.dumps(self.inputs[stage], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`generation.num_inference_steps: 4 -> 8`, for every input that differs."""
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
