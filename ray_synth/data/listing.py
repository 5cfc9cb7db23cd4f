"""Which files below a place are data: without what systems and tools leave behind, and each only once.

Archives from a Mac hold `__MACOSX/` and `._x.png`, a NAS adds `@eaDir/`, a notebook
`.ipynb_checkpoints/`: pictures, by their names, that no one took for the data set.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow.fs as pafs

from ray_synth.errors import UserError

# In lower case; all that begins with a dot besides.
LEFTOVERS = {
    "__macosx", "@eadir", "@__thumb", "@recycle", "@recently-snapshot", "@tmp", "#recycle",
    "#snapshot", "$recycle.bin", "system volume information", "lost+found", "__pycache__",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip
NO_ENDING = "without an ending"
LEADS_BACK = "links to folders that are read already"


class Listing(NamedTuple):
    """What lies below a place.

    Attributes:
        files: paths below it, with `/`, sorted.
        folders: names of the folders right in it.
        passed_over: what is no data, by what it is.
    """

    files: list[str]
    folders: set[str]
    passed_over: Counter[str]


def is_leftover(name: str) -> bool:
    """Whether a file or folder is one that a system or a tool leaves behind, by its own name."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def ending(name: str) -> str:
    """`.heic`, in lower case; `NO_ENDING` for none."""
    found = PurePosixPath(name).suffix.lower()
    return found if 1 < len(found) <= 8 and found.isascii() and " " not in found else NO_ENDING


def list_files(filesystem: pafs.FileSystem, root: str) -> Listing:
    """All files below a folder that are data. Links to folders are followed, unless they lead back.

    Raises:
        UserError: a folder may not be read, or a name is not UTF-8; names it.
    """
    if filesystem.type_name == "local":
        return _list_local(root)
    files, folders, passed_over = [], set(), Counter[str]()
    for info in filesystem.get_file_info(pafs.FileSelector(root, recursive=True)):
        name = info.path[len(root) :].strip("/")
        parts = name.split("/")
        leftover = next((part for part in parts if is_leftover(part)), None)
        if leftover is not None:
            if info.is_file:
                passed_over[_kind(leftover, folder=leftover != parts[-1])] += 1
        elif info.is_file:
            files.append(name)
            folders.update(parts[:-1][:1])
        elif len(parts) == 1:
            folders.add(name)
    return Listing(sorted(files), folders, passed_over)


def _list_local(root: str) -> Listing:
    """As `list_files`, without asking for the size of each file, which a network disk is slow to tell."""
    files: list[str] = []
    folders: set[str] = set()
    passed_over: Counter[str] = Counter()
    above = {_identity(str(folder)) for folder in (Path(root), *Path(root).absolute().parents)}
    for name, kind in _entries(root, passed_over):
        if kind == "file":
            files.append(name)
        elif kind == "link" and _identity(os.path.join(root, name)) in above:
            passed_over[LEADS_BACK] += 1
        else:
            folders.add(name)
            files += _files_below(root, name, above, passed_over)
    return Listing(sorted(files), folders, passed_over)


def _files_below(
    root: str, top: str, above: set[tuple[int, int]], passed_over: Counter[str]
) -> list[str]:
    """Files of a class; each folder is read once, whatever links lead to it."""
    files: list[str] = []
    seen = set(above)
    waiting = deque([top])
    while waiting:
        folder = waiting.popleft()
        identity = _identity(os.path.join(root, folder))
        if identity in seen:
            passed_over[LEADS_BACK] += 1
            continue
        seen.add(identity)
        for name, kind in _entries(os.path.join(root, folder), passed_over):
            path = f"{folder}/{name}"
            if kind == "file":
                files.append(path)
            elif kind == "link":
                waiting.append(path)  # last: what it leads to keeps its own name
            else:
                waiting.appendleft(path)
    return files


def _identity(folder: str) -> tuple[int, int]:
    with _readable(folder):
        found = os.stat(folder)
    return found.st_dev, found.st_ino


@contextmanager
def _readable(folder: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"{folder} may not be read by this user ({error.strerror}); give it the right to, or move it "
            "out of the data set"
        ) from None


def _entries(folder: str, passed_over: Counter[str]) -> list[tuple[str, str]]:
    """(name, `file`, `folder` or `link`) of what is data right in a folder, by name; a link is one to a
    folder."""
    entries = []
    with _readable(folder), os.scandir(folder) as found:
        for entry in found:
            kind = _what(entry)
            if is_leftover(entry.name):
                passed_over[_kind(entry.name, folder=kind not in ("file", None))] += 1
            elif kind is None:
                passed_over["links that lead nowhere, or special files"] += 1
            else:
                entries.append((_utf8(folder, entry.name), kind))
    return sorted(entries)


def _utf8(folder: str, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(os.path.join(folder, name)).decode(errors="backslashreplace")
        raise UserError(
            f"the name of {shown} is not UTF-8: rename it (of a whole folder: convmv -f latin1 -t utf8 "
            "-r --notest FOLDER)"
        ) from None
    return name


def _what(entry: os.DirEntry[str]) -> str | None:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
    except OSError:  # a link to itself
        return None
    return None


def _kind(name: str, *, folder: bool) -> str:
    if name.startswith("."):
        return "hidden folders" if folder else "hidden files"
    return f"{name}/" if folder else name
