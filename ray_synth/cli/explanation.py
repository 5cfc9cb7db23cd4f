"""What a user is told of an error, and which errors a user can mend."""

from __future__ import annotations

import errno
import re
from typing import Any

from ray_synth.storage.filesystems import storage_problem


def explain(error: BaseException) -> str | None:
    """One clear message for an error that a user can mend; None for all others.

    Ray wraps what its workers raise: the user's ValueError is looked for inside.
    """
    seen: set[int] = set()
    pending: list[Any] = [error]
    while pending:
        current = pending.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        full = isinstance(current, OSError) and current.errno == errno.ENOSPC
        if full or f"[Errno {errno.ENOSPC}]" in str(current):
            where = re.search(r"No space left on device: '([^']+)'", str(current))
            return (
                f"no space left on the disk ({where[1] if where else 'while writing'}); free some "
                "and run the same command again: what was finished is kept"
            )
        if isinstance(current, OSError) and (problem := storage_problem(current)):
            return f"{problem}. Run the same command again: what was finished is kept"
        if type(current) is ValueError or type(current).__name__ == "RayTaskError(ValueError)":
            cause = getattr(current, "cause", None)
            return str(cause if isinstance(cause, ValueError) else current).strip()
        # An error that crossed processes twice is left as text alone.
        crossed = str(current) if type(current).__name__.startswith("RayTaskError") else ""
        remote = re.findall(r"^ValueError: (.+)$", crossed, re.MULTILINE)
        if remote:
            return str(remote[-1]).strip()
        stalled = re.search(r"no progress for at least (\d+)s", str(current))
        if stalled:
            return (
                f"generation stalled: no image was made for {stalled[1]} s. Either no worker has the "
                "CPUs and GPUs that generation.num_cpus and num_gpus ask for (see `ray status`), or "
                "a batch takes longer than that: raise cluster.no_progress_timeout_s. What was made "
                "is kept; the same command continues"
            )
        failures = getattr(current, "worker_failures", None)
        pending += list(failures.values()) if isinstance(failures, dict) else []
        pending += [getattr(current, "cause", None), current.__cause__]
    return None
