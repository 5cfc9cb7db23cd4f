"""Every metric that our processes give to Ray's Prometheus metrics, declared in one place.

Metrics go to the node's agent, which Prometheus scrapes, under `exported` names. Outside of Ray nothing
is recorded. One record costs 1.5 microseconds; they are made once per batch or every `log_every` steps.

What Ray 2.60 does with them, as seen: a counter outlives the process that counted, and loses at most the
last 10 s of one that is killed; a gauge vanishes 25 s after it was last set, so dashboards look at the
last few minutes of it (`last_over_time`); a histogram's sum is made of the middles of its buckets, so
times that are added up are counters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PREFIX = "ray_synth_"
SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0)
ANSWER_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        kind: counter, gauge or histogram.
        tags: Prometheus labels, of few values each: no ids of images, no texts of errors.
        boundaries: of a histogram's buckets.
    """

    kind: str
    description: str
    tags: tuple[str, ...] = ("run",)
    boundaries: tuple[float, ...] = SECONDS


ARM = ("run", "arm")
METRICS = {
    # The driver, every few seconds while it lives.
    "stage_seconds": Metric("gauge", "seconds since the stage under way began", ("run", "stage")),
    "images_left": Metric("gauge", "images that the generation under way has yet to make"),
    # Generator actors, once per batch.
    "generated_images_total": Metric("counter", "images made, rejected ones included"),
    "generator_seconds_total": Metric("counter", "seconds that generators were at work"),
    "generator_rows_total": Metric("counter", "plan rows in generator batches"),
    "generator_places_total": Metric("counter", "places in these batches, padding included"),
    "faulty_images_total": Metric(
        "counter",
        "images that a check found fault with: rejected, flagged, or retried with a new seed",
        ("run", "outcome", "reason"),
    ),
    "store_write_seconds": Metric("histogram", "time to write a part of the store"),
    "storage_retries_total": Metric("counter", "reads and writes of the store tried again"),
    # Training workers, every log_every steps.
    "training_steps_total": Metric("counter", "optimizer steps", ARM),
    "training_images_total": Metric("counter", "images trained on", (*ARM, "domain")),
    "training_loss": Metric("gauge", "mean loss of a step's images", (*ARM, "domain")),
    "training_seconds_total": Metric("counter", "seconds in the training loop", ARM),
    "training_waited_seconds_total": Metric(
        "counter", "seconds of these spent waiting for data", ARM
    ),
    "synthetic_draws_total": Metric(
        "counter", "synthetic images drawn by the live feed: fresh, or replayed", (*ARM, "kind")
    ),
    "reservoir_images": Metric("gauge", "images that the live feed holds", ARM),
    "checkpoint_seconds": Metric("histogram", "time to save and report a checkpoint", ARM),
    # Predictors, once per batch.
    "evaluated_images_total": Metric("counter", "test images seen by all models"),
    # The service; Serve counts requests, errors, queues and replicas by itself.
    "request_seconds": Metric(
        "histogram", "time to an answer, by operation", ("operation",), ANSWER_SECONDS
    ),
    "questions_total": Metric("counter", "questions to the language model", ()),
    "refused_phrases_total": Metric("counter", "pieces of LLM answers that were not phrases", ()),
    "meanings_total": Metric("counter", "class names resolved", ("source", "ambiguous")),
    "images_total": Metric("counter", "images that judged meanings", ()),
}

_made: dict[str, Any] = {}
_tags: dict[str, str] = {"run": ""}


def join(uri: str) -> None:
    """Name the run that this process works for, by its directory: the `run` of what it records."""
    _tags["run"] = run_name(uri)


def record(name: str, value: float, **tags: str) -> None:
    """Add to a counter, set a gauge, or observe in a histogram; nothing outside of Ray.

    Args:
        name: one of `METRICS`.
        tags: its tags; `run` is known from `join`.
    """
    declared = METRICS[name]
    ray = sys.modules.get("ray")  # not imported for this: whoever runs in Ray has it
    if ray is None or not ray.is_initialized():
        return
    if name not in _made:
        _made[name] = make(name)
    metric = _made[name]
    labels = {key: tags[key] if key in tags else _tags[key] for key in declared.tags}
    if declared.kind == "gauge":
        metric.set(value, labels)
    elif declared.kind == "histogram":
        metric.observe(value, labels)
    elif value > 0:  # Ray's counters refuse 0
        metric.inc(value, labels)


@contextmanager
def timed(name: str, **tags: str) -> Iterator[None]:
    """Observe how long the block took, in a histogram; not where it raises."""
    started = time.perf_counter()
    yield
    record(name, time.perf_counter() - started, **tags)


def make(name: str, library: Any = None) -> Any:
    """The Ray metric, of `ray.util.metrics` or of a library that looks like it."""
    if library is None:
        from ray.util import metrics as library
    declared = METRICS[name]
    options: dict[str, Any] = {"description": declared.description, "tag_keys": declared.tags}
    if declared.kind == "histogram":
        options["boundaries"] = list(declared.boundaries)
    return getattr(library, declared.kind.capitalize())(PREFIX + name, **options)


def exported(name: str) -> list[str]:
    """The names under which Prometheus sees a metric."""
    whole = f"ray_{PREFIX}{name}"
    if METRICS[name].kind == "histogram":
        return [f"{whole}_bucket", f"{whole}_count", f"{whole}_sum"]
    return [whole]


def run_name(uri: str) -> str:
    """`cars` for the run directory `s3://bucket/runs/cars`; `cars/studies` for all that its studies
    keep, whose parts are named by digests."""
    parts = uri.partition("?")[0].rstrip("/").split("/")
    if "studies" in parts[1:]:
        at = parts.index("studies", 1)
        return "/".join(parts[at - 1 : at + 1])
    return parts[-1]
