"""What a training worker tells of itself, every `log_every` steps and with each checkpoint.

Every rank gives to the metrics; rank 0 besides to the pipeline's MLflow run and the progress board.
"""

from __future__ import annotations

import time
from typing import Any

from ray_synth.metrics import record
from ray_synth.training.job import TrainJob

ARMS = ("mixed", "real_only", "recipe")


class Stopwatch:
    """Seconds, and those of them that training waited for its batches, from lap to lap."""

    def __init__(self, prefetcher: Any) -> None:
        self.prefetcher = prefetcher
        self._now, self._waited = time.perf_counter(), prefetcher.waited

    def lap(self) -> tuple[float, float]:
        """(seconds, waited) since the last lap."""
        now, waited = time.perf_counter(), self.prefetcher.waited
        passed = now - self._now, waited - self._waited
        self._now, self._waited = now, waited
        return passed


class Meter:
    """Counts one worker's progress, as differences since the last time.

    Args:
        feeds: the real feed, and the synthetic one where there is one.
        start: the step that training goes on from.
    """

    def __init__(
        self, job: TrainJob, feeds: list[Any], prefetcher: Any, *, rank: int, start: int
    ) -> None:
        self.job, self.feeds, self.rank = job, feeds, rank
        self.arm = job.arm if job.arm in ARMS else "trial"  # a study's are named by digests
        self._step = start
        self._stopwatch = Stopwatch(prefetcher)
        self._drawn = (0, 0)
        self._curve = None
        if rank == 0 and job.tracking is not None:
            from ray_synth.monitoring.mlflow_run import MetricLogger

            self._curve = MetricLogger(job.tracking, prefix=job.arm)

    def begin(self) -> None:
        """The first batch is there: from here on, waiting is a stall."""
        self._stopwatch.lap()

    def tell(self, done: int, point: dict[str, float]) -> None:
        """Record the steps up to `done`; `point` is the curve's."""
        steps, self._step = done - self._step, done
        batches = steps * self.job.config.accumulate_steps
        seconds, waited = self._stopwatch.lap()
        tags = {"arm": self.arm}
        record("training_seconds_total", seconds, **tags)
        record("training_waited_seconds_total", waited, **tags)
        sizes = {"real": self.job.config.num_real, "synthetic": self.job.num_synth}
        for domain, size in sizes.items():
            record("training_images_total", batches * size, domain=domain, **tags)
        self._tell_feed(tags)
        if self.rank == 0:
            record("training_steps_total", steps, **tags)
            for domain, key in (("real", "loss_real"), ("synthetic", "loss_synth")):
                if key in point:
                    record("training_loss", point[key], domain=domain, **tags)
            if self.job.board is not None:
                self.job.board.put.remote(f"steps/{self.job.arm}", done)
        if self._curve is not None:
            self._curve(point, done)

    def _tell_feed(self, tags: dict[str, str]) -> None:
        feed = self.feeds[-1]
        if not hasattr(feed, "replayed"):
            return
        drawn = (feed.fresh_drawn, feed.replayed)
        for kind, now, before in zip(("fresh", "replayed"), drawn, self._drawn, strict=True):
            record("synthetic_draws_total", now - before, kind=kind, **tags)
        self._drawn = drawn
        record("reservoir_images", len(feed.images), **tags)

    def checkpointed(self, seconds: float) -> None:
        """A checkpoint was saved and reported."""
        if self.rank == 0:
            record("checkpoint_seconds", seconds, arm=self.arm)

    def close(self) -> None:
        """Wait until what was told has arrived."""
        if self._curve is not None:
            self._curve.close()
