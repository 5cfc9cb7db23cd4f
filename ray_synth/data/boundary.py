"""Where data come in: what goes wrong with a file of the user's is told by the file's name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from ray_synth.errors import UserError, first_line
from ray_synth.storage.filesystems import BROKEN
from ray_synth.storage.texts import IS_POINTER, is_pointer


@contextmanager
def reading(place: str) -> Iterator[None]:
    """A block that reads a file or folder of a data set.

    A storage that does not answer is not the file's fault, and passes as it is.

    Raises:
        UserError: names `place` or what in it cannot be read, and the fix.
    """
    try:
        yield
    except UserError:
        raise
    except UnicodeError:
        raise UserError(_odd_name(place)) from None
    except FileNotFoundError:
        raise UserError(f"no such file or folder: {place}") from None
    except PermissionError as error:
        raise UserError(
            f"{place} may not be read by this user ({_line(error)}); give it the right to, or move it "
            "out of the data set"
        ) from None
    except (pa.ArrowException, OSError, EOFError) as error:
        if not _is_broken(error):
            raise
        raise UserError(f"{place} is {_broken(place, error)}") from None


def _is_broken(error: Exception) -> bool:
    if isinstance(error, OSError) and not isinstance(error, pa.ArrowException):
        odd = error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR)
        return odd or (error.errno is None and bool(BROKEN.search(str(error))))
    return not isinstance(error, pa.ArrowMemoryError | pa.ArrowCancelled)


def _broken(place: str, error: Exception) -> str:
    """What a file is that cannot be read as what its name says."""
    if os.path.isfile(place):
        with open(place, "rb") as file:
            head = file.read(64)
        if not head:
            return "empty; fetch it again, or move it out of the data set"
        if is_pointer(head):
            return IS_POINTER
    kind = "not a Parquet file, or a broken one" if place.endswith(".parquet") else "broken"
    return f"{kind} ({_line(error)}); fetch or write it again, or move it out of the data set"


def _line(error: Exception) -> str:
    return first_line(error).partition(": ")[2]


def _odd_name(place: str) -> str:
    """Names the first file or folder below a place whose name is no UTF-8."""
    fix = "rename it (of a whole folder: convmv -f latin1 -t utf8 -r --notest FOLDER)"
    for folder, folders, files in os.walk(os.fsencode(place)):
        for name in sorted([*folders, *files]):
            try:
                name.decode()
            except UnicodeDecodeError:
                where = os.path.join(folder, name).decode(errors="backslashreplace")
                return f"the name of {where} is not UTF-8: {fix}"
    return f"{place} holds a name that is not UTF-8: {fix}"
