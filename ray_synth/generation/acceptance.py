"""What the checks let pass: by kind of prompt, by style, by class. Kept in `quality/acceptance.json`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.storage.folder import Folder

ACCEPTANCE = "acceptance.json"
COLUMNS = ("kind", "style", "class_name")


class Acceptance:
    """Counts over tables of the store."""

    def __init__(self) -> None:
        self._made: dict[str, Counter[str]] = {name: Counter() for name in COLUMNS}
        self._passed: dict[str, Counter[str]] = {name: Counter() for name in COLUMNS}

    def add(self, table: pa.Table) -> None:
        """Count rows (columns `COLUMNS` and `reject_reason`); one without a reason has passed."""
        passed = pc.equal(table["reject_reason"], "")
        for counts, rows in ((self._made, table), (self._passed, table.filter(passed))):
            for name in COLUMNS:
                for item in pc.value_counts(rows[name]).to_pylist():
                    counts[name][item["values"]] += item["counts"]

    def as_dict(self) -> dict[str, dict[str, list[int]]]:
        """column -> value -> [passed, made]; rows without a style are left out of the styles."""
        return {
            name: {
                value: [self._passed[name][value], made]
                for value, made in sorted(self._made[name].items())
                if value
            }
            for name in COLUMNS
        }

    def save(self, run: Folder) -> None:
        run.child("quality").write_json(ACCEPTANCE, self.as_dict())


def least_accepted(found: dict[str, Any], column: str, most: int) -> list[tuple[str, int, int]]:
    """(value, passed, made) of a column, the smallest shares first."""
    rows = [(value, passed, made) for value, (passed, made) in (found.get(column) or {}).items()]
    return sorted(rows, key=lambda row: (row[1] / row[2], row[0]))[:most]
