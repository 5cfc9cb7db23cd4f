"""The service's own figures among Ray's Prometheus metrics (`ray_synth_...`), on each node's port."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.serve.metrics import Counter, Histogram

SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]
logger = logging.getLogger("ray.serve")


class Metrics:
    """What the ingress counts; Serve counts requests, errors, queues and batches by itself."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "ray_synth_request_seconds",
            description="time to an answer, by operation",
            boundaries=SECONDS,
            tag_keys=("operation",),
        )
        tags: Any = ("source", "ambiguous")  # Ray's hint says a tuple of one
        self._resolved = Counter(
            "ray_synth_meanings_total", description="class names resolved", tag_keys=tags
        )
        self._refused = Counter(
            "ray_synth_refused_phrases_total",
            description="pieces of LLM answers that were no phrases",
        )
        self._images = Counter("ray_synth_images_total", description="images that judged meanings")

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Observe how long the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds.observe(time.perf_counter() - started, {"operation": operation})

    def resolved(self, entry: dict[str, Any]) -> None:
        """Count an entry of meanings.json."""
        source = entry["candidates"][0]["source"]
        self._resolved.inc(1, {"source": source, "ambiguous": str(entry["ambiguous"]).lower()})
        for counter, count in ((self._refused, "num_refused"), (self._images, "num_images")):
            if entry[count]:  # Ray's counters refuse 0
                counter.inc(entry[count])

    def log_failure(self, error: Exception) -> None:
        """Say in the log what a caller is not told."""
        logger.error("a class of a batch failed: %s", type(error).__name__, exc_info=error)
