"""What a training worker gives to the metrics, every `log_every` steps and with each checkpoint."""

from __future__ import annotations

import time
from typing import Any

from ray_synth.metrics import record
from ray_synth.training.job import TrainJob

ARMS = ("mixed", "real_only")


class Meter:
    """Counts one worker's progress, as differences since the last time.

    Args:
        feeds: the real feed, and the synthetic one where there is one.
        start: the step that training goes on from.
    """

    def __init__(
        self, job: TrainJob, feeds: list[Any], prefetcher: Any, *, rank: int, start: int
    ) -> None:
        self.job, self.feeds, self.prefetcher, self.rank = job, feeds, prefetcher, rank
        self.arm = job.arm if job.arm in ARMS else "trial"  # a study's are named by digests
        self._step = start
        self._at, self._waited = time.perf_counter(), 0.0
        self._drawn = (0, 0)

    def begin(self) -> None:
        """The first batch is there: from here on, waiting is a stall."""
        self._at, self._waited = time.perf_counter(), self.prefetcher.waited

    def tell(self, done: int, point: dict[str, float]) -> None:
        """Record the steps up to `done`; `point` is the curve's."""
        steps, self._step = done - self._step, done
        batches = steps * self.job.config.accumulate_steps
        now, waited = time.perf_counter(), self.prefetcher.waited
        tags = {"arm": self.arm}
        record("training_seconds_total", now - self._at, **tags)
        record("training_waited_seconds_total", waited - self._waited, **tags)
        self._at, self._waited = now, waited
        sizes = {"real": self.job.config.num_real, "synthetic": self.job.num_synth}
        for domain, size in sizes.items():
            record("training_images_total", batches * size, domain=domain, **tags)
        self._tell_feed(tags)
        if self.rank == 0:
            record("training_steps_total", steps, **tags)
            for domain, key in (("real", "loss_real"), ("synthetic", "loss_synth")):
                if key in point:
                    record("training_loss", point[key], domain=domain, **tags)

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
