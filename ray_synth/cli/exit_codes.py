"""With what the command ends: docs/cli.md has the same table."""

from __future__ import annotations

from ray_synth.cluster.signals import INTERRUPTED, TERMINATED
from ray_synth.report.status import DONE, RUNNING, SILENT

OK, NO, USER_ERROR = 0, 1, 2
BUG = 1
EXIT_CODES: dict[int, str] = {
    OK: "done; of `status`: the run is done",
    NO: "a bug, with its traceback; or the answer is no: `doctor` says that the config does not fit, "
    "`regenerate` that the pixels differ",
    USER_ERROR: "something that you can fix, said in one message: a setting, a file, an option",
    RUNNING: "`status`: the run is at work",
    SILENT: "`status`: the run is neither done nor at work",
    INTERRUPTED: "stopped by Ctrl-C; what was made is kept",
    TERMINATED: "stopped by SIGTERM; what was made is kept",
}
assert OK == DONE
