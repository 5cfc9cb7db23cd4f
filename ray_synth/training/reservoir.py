"""Images held for training: in memory up to a budget, beyond it in a temporary file."""

from __future__ import annotations

import sqlite3
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_synth.errors import UserError
from ray_synth.training.decoder import Item


class Reservoir:
    """Items by key. Not thread-safe: its user holds a lock.

    Args:
        memory_bytes: what may be held in memory; the rest is spilled to a temporary SQLite file,
            which uses the room of deleted items again and vanishes with the process.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.held_bytes = 0
        self._items: dict[int, Item] = {}
        self._keys = count()
        self._disk: _Spill | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: int) -> bool:
        return key in self._items

    @property
    def spilled(self) -> int:
        """How many items lie in the file."""
        return sum(item.form is None for item in self._items.values())

    def put(self, item: Item) -> int:
        """Hold an item; its key."""
        key = next(self._keys)
        size = _size(item.form)
        if self.held_bytes + size <= self.memory_bytes:
            self.held_bytes += size
        else:
            self._disk = self._disk or _Spill()
            self._disk.write(key, item.form)
            item = item._replace(form=None)
        self._items[key] = item
        return key

    def get(self, key: int) -> Item:
        item = self._items[key]
        if item.form is None:
            assert self._disk is not None
            return item._replace(form=self._disk.read(key))
        return item

    def label(self, key: int) -> int:
        return self._items[key].label

    def drop(self, key: int) -> None:
        item = self._items.pop(key)
        if item.form is not None:
            self.held_bytes -= _size(item.form)
        else:
            assert self._disk is not None
            self._disk.delete(key)

    def close(self) -> None:
        self._items.clear()
        if self._disk is not None:
            self._disk.close()
            self._disk = None


class _Spill:
    """Pixels or encoded bytes by key, in a SQLite file of this process's own."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ray-synth-reservoir-")
        self._base = sqlite3.connect(
            Path(self._folder.name) / "images.db", check_same_thread=False, isolation_level=None
        )
        # Nothing here outlives the process, so nothing needs to survive a crash.
        self._base.execute("PRAGMA journal_mode=OFF")
        self._base.execute("PRAGMA synchronous=OFF")
        self._base.execute("CREATE TABLE images (key INTEGER PRIMARY KEY, side INTEGER, data BLOB)")

    def write(self, key: int, form: Any) -> None:
        pixels = isinstance(form, torch.Tensor)
        side = form.shape[-1] if pixels else 0
        data = form.numpy().tobytes() if pixels else form
        try:
            self._base.execute("INSERT INTO images VALUES (?, ?, ?)", (key, side, data))
        except sqlite3.OperationalError as error:
            raise UserError(
                f"the reservoir's temporary file in {tempfile.gettempdir()} cannot grow ({error}): "
                "free some room there, point TMPDIR elsewhere, or raise training.memory_mb"
            ) from None

    def read(self, key: int) -> Any:
        row = self._base.execute("SELECT side, data FROM images WHERE key = ?", (key,)).fetchone()
        side, data = row
        if not side:
            return data
        return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).reshape(3, side, side).copy())

    def delete(self, key: int) -> None:
        self._base.execute("DELETE FROM images WHERE key = ?", (key,))

    def close(self) -> None:
        self._base.close()
        self._folder.cleanup()


def _size(form: Any) -> int:
    return form.nbytes if isinstance(form, torch.Tensor) else len(form)
