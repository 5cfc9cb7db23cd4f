"""When training is given up: consecutive failures, not failures in all.

Ray Train counts over the whole run. On spot nodes, which mostly go without a notice, a long run loses
more of them than anyone would allow a bug to fail.
"""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from ray_synth.errors import UserError


class ConsecutiveFailures(UserCallback):
    """Ends a run after more than `most` failures with no checkpoint between them; -1: never.

    Called in Ray Train's controller, which ends the run with what a callback raises.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.failures = 0

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        if checkpoint is not None:
            self.failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # A node that went as announced is not a failure, and is reported at each look until its deadline.
        if any(_preempted(error) for error in worker_exceptions.values()):
            return
        for error in worker_exceptions.values():
            if (mistake := _mistake(error)) is not None:  # to try again would not fix it
                raise UserError(str(mistake))
        self.failures += 1
        if 0 <= self.most < self.failures:
            rank, error = min(worker_exceptions.items())
            raise RuntimeError(
                f"training failed {self.failures} times without a new checkpoint between "
                f"(training.max_failures {self.most}); worker {rank}, at last: {error}"
            )


def _preempted(error: Exception) -> bool:
    died = getattr(error, "health_check_failure", error)
    return getattr(died, "preempted", False)


def _mistake(error: BaseException | None) -> UserError | None:
    """The user's mistake that an error is, or comes from."""
    while error is not None and not isinstance(error, UserError):
        error = getattr(error, "cause", None) or error.__cause__
    return getattr(error, "cause", None) or error
