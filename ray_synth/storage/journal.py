"""Results of a long stage as they come: one small file each, until the stage writes its own file.

A file that is written anew for each class would be written whole a thousand times.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ray_synth.storage.filesystems import at_once
from ray_synth.storage.folder import Folder


class Journal:
    """Values by key, in files of their own in `NAME.partial/`; those of another digest count for nothing.

    Args:
        digest: of the settings that the values depend on.
    """

    def __init__(self, folder: Folder, name: str, digest: str) -> None:
        self.folder, self.digest = folder.child(f"{name}.partial"), digest

    def entries(self) -> dict[str, Any]:
        """What was added under this digest, by this process or an earlier one."""
        names = [n for n in self.folder.names(".json") if n.startswith(f"{self.digest}-")]
        kept = at_once(self.folder.read_json, names)
        return {item["key"]: item["value"] for item in kept}

    def add(self, key: str, value: Any) -> None:
        """Keep a value; it replaces an earlier one of its key."""
        name = f"{self.digest}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        self.folder.write_json(name, {"key": key, "value": value})

    def clear(self) -> None:
        """Delete all files, of other digests too."""
        at_once(self.folder.delete, self.folder.names(".json"))
        self.folder.remove_empty()
