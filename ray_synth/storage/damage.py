"""Files of a run that are not what they were: empty, cut off, changed, or something else by their name.

A reader's error comes in; one message that names the file and the fix comes out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from ray_synth.errors import UserError, first_line
from ray_synth.storage.filesystems import BROKEN

# What to do, by the end of the file's address.
FIXES = (
    (r"part-[^/]*\.parquet", "run the same command (or `ray-synth generate`) again: the file is set "
     "aside, and its images alone are made again"),
    (r"plan\.parquet", "put a copy back, or write it anew with --force-stage plan: images of rows that "
     "stay the same are kept"),
    (r"meanings\.json", "put a copy back, or ask for all meanings again with --force-stage meaning"),
    (r"quality_reference\.parquet", "redo it with --force-stage quality"),
    (r"stages/[^/]*\.json", "delete it, and the stage is done again"),
)  # fmt: skip
OTHERWISE = "put a copy back, or delete it and run the same command again"
# What Arrow raises of bytes that are no Parquet. Flipped bits may ask for any amount of memory.
OF_BYTES = (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowNotImplementedError, pa.ArrowTypeError,
            pa.ArrowSerializationError, pa.ArrowMemoryError, KeyError, UnicodeDecodeError,
            json.JSONDecodeError)  # fmt: skip


class DamagedFile(UserError, OSError):
    """A file of a run cannot be read, or holds something else than it was written with."""


def damaged(address: str, why: str, fix: str | None = None) -> DamagedFile:
    """The error of a file; the fix is that of its name, unless given."""
    known = (text for pattern, text in FIXES if re.search(rf"(^|/){pattern}$", address))
    return DamagedFile(f"{address} is damaged ({why}): {fix or next(known, OTHERWISE)}")


@contextmanager
def told(address: str, *, remote: bool) -> Iterator[None]:
    """A block that reads one file; what its bytes are to blame for is raised as `DamagedFile`.

    A missing file, a refusal and a storage that does not answer stay what they are.
    """
    try:
        yield
    except DamagedFile:
        raise
    except OF_BYTES as error:
        raise damaged(address, first_line(error, 150)) from error
    except OSError as error:
        if error.errno is not None or isinstance(error, FileNotFoundError | PermissionError):
            raise
        if remote and not BROKEN.search(str(error)):
            raise
        raise damaged(address, first_line(error, 150)) from error
