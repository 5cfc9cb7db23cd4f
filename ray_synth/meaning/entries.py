"""meanings.json as it is kept: one entry per class, which whoever reads it may rely on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_synth.errors import shortened
from ray_synth.storage.damage import damaged
from ray_synth.storage.folder import Folder

MEANINGS = "meanings.json"
SHOWN = 5  # classes in a message


def read_meanings(folder: Folder, class_names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The entries of meanings.json, one per class and in their order.

    Args:
        class_names: of the run, for whoever goes on from them; without it, choices may be missing.

    Raises:
        DamagedFile: it is missing, cut off, or lacks a class or its choice.
    """
    address = folder.address(MEANINGS)
    try:
        entries = folder.read_json(MEANINGS)
    except FileNotFoundError:
        raise damaged(address, "it is gone") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise damaged(address, "it is not a list with one entry per class")
    for entry in entries:
        choice = entry.get("choice")
        unchosen = not isinstance(choice, str) or not choice.strip()
        if unchosen and class_names is not None:
            raise damaged(address, f"class {entry.get('class_name')!r} has no choice")
    found = [entry.get("class_name") for entry in entries]
    if not all(isinstance(name, str) for name in found):
        raise damaged(address, "an entry has no class_name")
    if class_names is not None and found != list(class_names):
        lacking = [name for name in class_names if name not in found]
        what = (
            f"it lacks {shortened(lacking, SHOWN)}" if lacking else "its classes are not the run's"
        )
        raise damaged(address, what)
    return entries
