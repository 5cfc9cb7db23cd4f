"""`ray-synth tune`: the run's generator fine-tuned on its real images, as a LoRA.

In: a config. Out: `<run>/tuned/<digest>/pytorch_lora_weights.safetensors`, for `generation.adapters` and
the study `rivals`. The same command continues what a kill has ended.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from ray_synth.cluster.connection import connect
from ray_synth.config import Config
from ray_synth.data.dataset import Index, read_at
from ray_synth.generators.protocol import digest_settings
from ray_synth.generators.registry import fingerprint, prompt_tokens
from ray_synth.generators.tuning import Tuning, check_tunable, tune
from ray_synth.meaning.entries import read_meanings
from ray_synth.pipeline.commits import fetch_generator
from ray_synth.pipeline.run import Run
from ray_synth.pipeline.runner import opened, start
from ray_synth.pipeline.steps import inspected, run_words
from ray_synth.prompting.contexts import PHOTO
from ray_synth.prompting.fitting import fit_prompt
from ray_synth.prompting.plan_settings import prompt_limit
from ray_synth.storage.folder import Folder

TUNED = "tuned"


def tune_generator(config: Config, tuning: Tuning) -> dict[str, Any]:
    """Tune the generator of a config on its training images, with a plain prompt for each class.

    Returns:
        What `tuned.json` keeps: `path` of the LoRA's folder, `steps`, `loss`, `images`, `seconds`,
        `model` and the settings.

    Raises:
        UserError: the model cannot be tuned, or as `run_pipeline`.
    """
    check_tunable(config.generation)
    with opened(config) as run, connect(run.config.cluster), ExitStack() as watching:
        start(run, "meaning", None, watching)
        run = inspected(run)
        if run.records.record("meaning") is None:
            from ray_synth.service.session import Service

            with Service(run.config) as service:
                run_words(run, service, plan=False)
        prompts = plain_prompts(run)
        asked = [tuning.digest_of(), prompts, fingerprint(run.config.generation)]
        digest = digest_settings([*asked, run.records.inputs["data"]])
        folder = run.folder.child(TUNED).child(digest)
        if folder.exists("tuned.json"):
            return folder.read_json("tuned.json")
        found = _tuned(run, tuning, prompts, folder)
    folder.write_json("tuned.json", found)
    return found


def plain_prompts(run: Run) -> list[str]:
    """The plain prompt of each class, as the plan has it."""
    generation = run.config.generation
    count, limit = prompt_tokens(generation)[0], prompt_limit(run.config)
    return [
        fit_prompt(
            PHOTO, entry["class_name"], entry["choice"], [], count_tokens=count, max_tokens=limit
        )
        for entry in read_meanings(run.folder, run.train.class_names)
    ]


def _tuned(run: Run, tuning: Tuning, prompts: list[str], folder: Folder) -> dict[str, Any]:
    import ray

    generation, started = run.config.generation, time.perf_counter()
    fetch_generator(run.config)
    work = ray.remote(num_cpus=generation.num_cpus, num_gpus=min(generation.num_gpus, 1))(_task)
    found = ray.get(work.remote(generation, tuning, run.train, prompts, folder))
    return {
        "path": folder.address(),
        **found,
        "images": len(run.train),
        "seconds": time.perf_counter() - started,
        "model": generation.model,
        "settings": tuning.digest_of(),
    }


def _task(
    generation: Any, tuning: Tuning, index: Index, prompts: list[str], folder: Folder
) -> dict[str, Any]:
    """On the node that tunes."""
    images = (np.asarray(index.label), lambda places: read_at(index, places))
    return tune(generation, tuning, images, prompts, folder)
