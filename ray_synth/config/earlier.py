"""Settings and values of earlier versions: runs that have them are still read."""

from __future__ import annotations

import copy
from typing import Any

# Settings of earlier versions, by dotted name -> what became of each. Runs that have them are still read.
RETIRED: dict[str, str] = {
    "meaning.llm.autoscaling": "Ray Serve's defaults; replicas: [fewest, most] follow the load",
    "meaning.clip.autoscaling": "Ray Serve's defaults; replicas: [fewest, most] follow the load",
    "meaning.llm.max_retries": "a server is asked 5 times again",
    "prompting.retries": "one round of asking again",
    "prompting.max_tokens": "the text encoder's own context length",
    "generation.channels_last": "always on",
    "generation.cache_prompts": "always on",
    "generation.overlap": "always on",
    "generation.reference.images_per_class": "16 real images per class take turns",
    "generation.checks.retries": "two new seeds are tried",
    "generation.checks.pixels": "always looked at; checks.policy: off looks at nothing",
    "generation.checks.duplicate_quantile": "clip_quantile is for both",
    "generation.checks.real_images_per_class": "32 real images per class set the thresholds",
    "training.channels_last": "always on",
    "training.num_threads": "all cores; a study shares them among trainings",
    "training.reservoir_images": "memory_mb bounds what a worker keeps",
    "training.reservoir_mb": "memory_mb bounds what a worker keeps",
    "training.cache_images": "memory_mb bounds what a worker keeps",
    "training.optimizer.clip_mode": "gradients are clipped by their norm",
    "training.optimizer.momentum": "optimizer.kwargs: {momentum: 0.9}",
    "evaluation.restrict_to_test_classes": "always done, where a test set has only some classes",
    "tracking.system_metrics": "always logged",
    "tracking.log_models": "always logged",
    "tracking.registered_model": "MLflow registers any logged model by its page or its API",
    "studies.imbalance": "20",
    "studies.validation": "data.validation; default: 20, at most a fifth of the smallest class",
    "cluster.max_reach.num_cpus": "max_reach: a list of node types, {count, num_cpus, num_gpus} each",
    "cluster.max_reach.num_gpus": "max_reach: a list of node types, {count, num_cpus, num_gpus} each",
    "cluster.max_reach.node_cpus": "max_reach: a list of node types, {count, num_cpus, num_gpus} each",
    "cluster.max_reach.node_gpus": "max_reach: a list of node types, {count, num_cpus, num_gpus} each",
}
# Values of earlier versions, by dotted name -> what each is called now.
RENAMED: dict[str, dict[Any, Any]] = {"training.baseline": {True: "matched", False: "none"}}


def of_today(key: str, value: Any) -> Any:
    """A setting's value in today's words; values of earlier versions are still read."""
    named = RENAMED.get(key, {})
    return named.get(value, value) if isinstance(value, bool) else value


def without_retired(values: dict[str, Any]) -> dict[str, Any]:
    """Settings without those of `RETIRED`."""
    values = copy.deepcopy(values)
    for name in RETIRED:
        *parents, leaf = name.split(".")
        section: Any = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(leaf, None)
    return values
