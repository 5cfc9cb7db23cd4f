"""What the classes of a run are called in other tools: labels that differ, and safe folder names.

The plan's class names in, as strangers wrote them; one name per class index out.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence

from ray_synth.generation.selection import count_by
from ray_synth.meaning.entries import MEANINGS, read_meanings
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.storage.folder import Folder

# Reserved on Windows, with any suffix.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def class_list(run_folder: Folder) -> list[str]:
    """The name of each class index of a run, made to differ: a second `crane` is `crane (2)`."""
    plan = PlanFile(run_folder).columns(["class_index", "class_name"])
    found = dict(count_by(plan, "class_index", "class_name").keys())
    if run_folder.exists(MEANINGS):  # it names the classes too that a short plan lacks
        known = dict(enumerate(entry["class_name"] for entry in read_meanings(run_folder)))
        found = {**known, **found}
    names: dict[str, None] = {}
    for index in range(max(found) + 1):
        base = found.get(index) or f"class {index}"
        names[_different(base, lambda name: name in names)] = None
    return list(names)


def folder_names(class_names: Sequence[str]) -> list[str]:
    """A folder name for each class: safe on any file system, and different for each.

    Letters and digits of all scripts, marks, spaces and `-_.,'()+` are kept; other characters become
    `_`. Names that would be hidden, skipped by loaders, reserved, or equal to another where case or
    Unicode form is ignored, are changed.
    """
    safe: list[str] = []
    taken: set[str] = set()
    for index, name in enumerate(class_names):
        text = "".join(
            c if unicodedata.category(c)[0] in "LNM" or c in " -_.,'()+" else "_"
            for c in unicodedata.normalize("NFC", name)
        )
        text = text.encode()[:120].decode(errors="ignore")
        # Loaders skip `.name` and `__name`; Windows drops dots and spaces at the end.
        text = text.strip(" ._")
        if not text or RESERVED.fullmatch(text):
            text = f"class {text or index}"
        text = _different(text, lambda name: _folded(name) in taken)
        taken.add(_folded(text))
        safe.append(text)
    return safe


def _different(name: str, taken: Callable[[str], bool]) -> str:
    """The name, or `name (2)`, `name (3)` and so on: the first that is not taken."""
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if not taken(each))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
