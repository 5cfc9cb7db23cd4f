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

from ray_synth.config import flatten, kept_config
from ray_synth.errors import UserError, duration
from ray_synth.monitoring.progress import under_way
from ray_synth.stages import FILES, STAGES, changed, from_on
from ray_synth.storage.damage import damaged
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")


CLEARED = ("quality", "generation")  # stages that, done again by force, begin with an empty store


class StageRecords:
    """The records `stages/<stage>.json` of a run directory.

    Args:
        inputs: for each stage, what its result depends on; see `stages.stage_inputs`.
    """

    def __init__(self, folder: Folder, inputs: dict[str, dict[str, Any]]) -> None:
        self.folder, self.inputs = folder, inputs
        self._again: tuple[str, ...] = ()
        self._told: dict[str, str] = {}

    def redo(self, stage: str | None) -> None:
        """Take a stage and all that follow it as not done. Raises UserError: there is no such stage."""
        self._again = from_on(stage) if stage else self._again

    def depend(self, key: str, value: str, first: str, told: str = "") -> None:
        """Add an input that is no setting to a stage and to those that follow it.

        Args:
            first: the first stage that depends on it.
            told: how it has changed, for people.
        """
        for stage in from_on(first):
            self.inputs[stage] = {**self.inputs[stage], key: value}
        if told:
            self._told[key] = told

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left; None where it is still to do.

        Raises:
            DamagedFile: what is kept of it is no record.
        """
        name = f"stages/{stage}.json"
        if stage in self._again or not self.folder.exists(name):
            return None
        found = self.folder.read_json(name)
        if not isinstance(found, dict) or not {"inputs", "seconds", "result"} <= found.keys():
            raise damaged(self.folder.address(name), "it is no record of a stage")
        return found

    def check(self, force_stage: str | None = None) -> None:
        """Compare all finished stages with the current inputs; nothing is written.

        Args:
            force_stage: do this stage and all that follow it again.

        Raises:
            UserError: a finished stage had other inputs; names them. Or there is no such stage.
        """
        self.redo(force_stage)
        for stage in STAGES:
            record = self.record(stage)
            if record is None:
                continue
            inputs = self.inputs[stage]
            changes = changed(record["inputs"], inputs, self._told)
            if changes:
                known = {key for key, value in record["inputs"].items() if inputs.get(key) != value}
                others = "files" if known <= self._told.keys() else "settings"
                raise UserError(
                    f"{self.folder.address()} holds a finished {stage} stage with other {others}:\n  "
                    + "\n  ".join(changes)
                    + f"\nGive the run a new name, or redo it with --force-stage {stage}"
                    + (", which deletes its images" if stage in CLEARED else "")
                    + self._cost(stage)
                )

    def _cost(self, first: str) -> str:
        """What it costs to do a stage and those that follow it again: what is done of them."""
        seconds = self.seconds()
        done = [stage for stage in from_on(first) if stage in seconds]
        took = duration(sum(seconds[stage] for stage in done))
        return f": {' and '.join(filter(None, [', '.join(done[:-1]), done[-1]]))} took {took}."

    def refill(self, stage: str) -> None:
        """Have a finished stage done again, and it alone: it makes what is missing."""
        self._again = (*self._again, stage)

    def forget(self) -> None:
        """Delete the records of the stages that are to be done again."""
        for stage in self._again:
            self.folder.delete(f"stages/{stage}.json")
            self.folder.delete(f"stages/{stage}.begun.json")
        self._again = ()

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
        """Of the settings that a stage depends on; its data are left out: those of one study are the
        same."""
        inputs = self.inputs[stage]
        return input_digest({k: v for k, v in inputs.items() if not k.startswith(FILES)})

    def token(self, stage: str) -> str:
        """Names what a stage has made so far, and not yet finished.

        The same as before where the inputs are, by `stages.changed`: a newer version of this package,
        with other settings besides, goes on where an older one was stopped.
        """
        name = f"stages/{stage}.begun.json"
        if self.folder.exists(name):
            begun = self.folder.read_json(name)
            if not changed(begun["inputs"], self.inputs[stage]):
                return begun["token"]
        token = input_digest(self.inputs[stage])
        self.folder.write_json(name, {"inputs": self.inputs[stage], "token": token})
        return token


def input_digest(inputs: dict[str, Any]) -> str:
    """12 hex digits of the inputs of a stage."""
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def adopt_older(folder: Folder, generator: str) -> None:
    """Find what version 0.1 had begun: it was named by digests over more settings than there are now.

    Args:
        generator: fingerprint of the image generator.
    """
    if not folder.exists("config.yaml"):
        return
    values = kept_config(folder)
    if "ray-synth" in values.get("versions", {}):
        return
    for stage, inputs in _inputs_0_1(values, generator).items():
        if not folder.exists(f"stages/{stage}.begun.json"):
            begun = {"inputs": inputs, "token": input_digest(inputs)}
            folder.write_json(f"stages/{stage}.begun.json", begun)


# Settings that version 0.1 left out of its digests, by name.
_HOW_0_1 = {
    "num_cpus", "num_gpus", "num_threads", "replicas", "pool", "max_batch_size", "batch_size",
    "decode_workers", "reservoir_mb", "autoscaling", "cache_dir", "cache_images", "timeout_s",
    "max_retries", "requests_per_minute", "api_key_env",
}  # fmt: skip


def _inputs_0_1(values: dict[str, Any], generator: str) -> dict[str, dict[str, Any]]:
    """The inputs of the stages that may be left half done, as version 0.1 wrote them."""
    data, generation = values["data"], values["generation"]
    names = ("train", "validation", "class_names", "max_pixels")
    meaning = {
        "seed": values["seed"],
        "data": {key: data[key] for key in names},
        "meaning": _without(values["meaning"], _HOW_0_1),
    }
    plan = {
        **meaning,
        "prompting": values["prompting"],
        "generator": generator,
        "generation": {"reference": generation["reference"]},
    }
    how = _HOW_0_1 - {"batch_size"} | {"max_failures"}
    training = {
        **plan,
        "generation": {**plan["generation"], "checks": generation["checks"]},
        "training": _without(values["training"], how),
    }
    found = {"meaning": meaning, "plan": plan, "training": training}
    return {stage: flatten(inputs) for stage, inputs in found.items()}


def _without(values: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in keys
    }
