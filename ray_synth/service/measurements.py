"""The service's own figures among Ray's Prometheus metrics, on each node's port.

They are declared with all others in `ray_synth/metrics.py`; Serve's classes add the deployment's labels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.serve import metrics as serve_metrics

from ray_synth.metrics import make

logger = logging.getLogger("ray.serve")


class Metrics:
    """What the ingress counts; Serve counts requests, errors, queues and batches by itself."""

    def __init__(self) -> None:
        self._seconds = make("request_seconds", serve_metrics)
        self._questions = make("questions_total", serve_metrics)
        self._refused = make("refused_phrases_total", serve_metrics)
        self._resolved = make("meanings_total", serve_metrics)
        self._images = make("images_total", serve_metrics)

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
        self.refused(entry["num_refused"])
        if entry["num_images"]:  # Ray's counters refuse 0
            self._images.inc(entry["num_images"])

    def asked(self) -> None:
        """Count a question to the language model."""
        self._questions.inc()

    def refused(self, pieces: int) -> None:
        """Count pieces of its answers that were of no use."""
        if pieces:
            self._refused.inc(pieces)

    def log_failure(self, error: Exception) -> None:
        """Say in the log what a caller is not told."""
        logger.error("a class of a batch failed: %s", type(error).__name__, exc_info=error)
