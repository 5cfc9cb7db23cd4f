"""What a user is told about an error, and which errors a user can fix."""

from __future__ import annotations

import errno
import re

from ray_synth.errors import UserError
from ray_synth.monitoring import logs
from ray_synth.storage.filesystems import storage_problem

DURING = "During handling of the above exception, another exception occurred:"
# An exception that crossed two processes is left as text, at the end of a traceback.
CROSSED = re.compile(
    r"^ray_synth\.(?:errors\.UserError|storage\.damage\.DamagedFile): (.+?)"
    r"(?=\n+(?:The above exception was|Traceback |  File |(?:\x1b\[\d+m)*ray::)|\Z)",
    re.MULTILINE | re.DOTALL,
)
WHAT_IT_MEANS = {
    errno.EACCES: "permission denied: this user may not read or write it",
    errno.EPERM: "permission denied: this user may not change it",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EIO: "the disk or the network file system fails to read or write it",
    errno.ESTALE: "the network file system lost it; mount it again",
}
# Classes of Ray, PyTorch and Python by name, so that none is loaded to look at an error.
MEMORY = {
    "OutOfMemoryError": "memory ran out, of a GPU or of a node (the log says where): lower batch_size "
    "of the stage, or give each worker more with num_cpus and num_gpus",
    "MemoryError": "memory ran out: lower batch_size, or close other programs",
}
RAYS_OWN = re.compile(r"^ray\.[\w.]+(:|$)", re.MULTILINE)


def explain(error: BaseException) -> str | None:
    """One clear message for an error that a user can fix; None for all others, which are bugs.

    Ray wraps what its workers raise, and an error may be the cause of another: both are looked into.
    What was merely being handled when an error came up (its context) says nothing of that error, but
    for a full disk and a storage that fails, which break whatever is cleaned up after them.
    """
    seen: set[int] = set()
    pending: list[tuple[object, bool]] = [(error, True)]
    while pending:
        current, is_cause = pending.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        message = (_user_error(current) if is_cause else None) or _surroundings(current)
        if message:
            return message
        if current.__cause__ is None and not current.__suppress_context__:
            pending.insert(0, (current.__context__, False))
        failures = getattr(current, "worker_failures", None)
        inside = list(failures.values()) if isinstance(failures, dict) else []
        inside += [getattr(current, name, None) for name in ("cause", "controller_failure")]
        inside.append(current.__cause__)
        pending += [(item, is_cause) for item in inside]
    return None


def _user_error(error: BaseException) -> str | None:
    """The message of a UserError, as it is or as Ray passes it on."""
    if isinstance(error, UserError):
        cause = getattr(error, "cause", None)
        return str(cause if isinstance(cause, UserError) else error).strip()
    if not any(kind.__module__.startswith("ray.") for kind in type(error).__mro__):
        return None
    *earlier, last = str(error).split(DURING)
    while earlier and not CROSSED.search(last) and RAYS_OWN.search(last):
        last = earlier.pop()  # Ray wraps what it handles
    found = CROSSED.findall(last)
    return found[-1].strip() if found else None


def _surroundings(error: BaseException) -> str | None:
    """What is wrong with the disk, the storage or the cluster; None where it is none of these."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or f"[Errno {errno.ENOSPC}]" in text:
        where = re.search(r"No space left on device: '([^']+)'", text)
        return (
            f"no space left on the disk ({where[1] if where else 'while writing'}); free some "
            "and run the same command again: what was finished is kept"
        )
    if isinstance(error, OSError) and (problem := storage_problem(error)):
        return f"{problem}. Run the same command again: what was finished is kept"
    if problem := _of_the_machine(error, text):
        return problem
    stalled = re.search(r"no progress for at least (\d+)s", text)
    if stalled:
        return (
            f"generation stalled: no image was made for {stalled[1]} s. Either no worker has the "
            "CPUs and GPUs that generation.num_cpus and num_gpus ask for (see `ray status`), or "
            "a batch takes longer than that: raise cluster.no_progress_timeout_s. What was made "
            "is kept; the same command continues"
        )
    return None


def _of_the_machine(error: BaseException, text: str) -> str | None:
    """What is wrong with files, limits or memory; a file that is missing may as well be a bug."""
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    found = re.search(r"\[Errno (\d+)\] [^:]+: (b?'[^']+')", text)  # also as Ray passes it on
    if number is None and found and isinstance(error, OSError):
        number = int(found[1])
    if number in (errno.EMFILE, errno.ENFILE):
        return "too many open files: raise the limit with `ulimit -n 65536`, and run the same again"
    if number in WHAT_IT_MEANS:
        name = getattr(error, "filename", None) or (found[2] if found else "a file")
        return f"{name}: {WHAT_IT_MEANS[number]}"
    kind = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in MEMORY), None)
    return (
        f"{MEMORY[kind]}. What was finished is kept; the same command continues" if kind else None
    )


def bug_report() -> str:
    """The line under the traceback of an error that no user can fix."""
    kept = f"; the run's log is {logs.last_file()}" if logs.last_file() else ""
    return (
        "this is a bug in ray-synth. The same command continues where it stopped; if it ends so "
        f"again, report it with the traceback above{kept}"
    )
