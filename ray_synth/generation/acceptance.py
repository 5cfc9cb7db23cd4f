"""What the checks let pass: by kind of prompt, style, class and scene. Kept in `quality/`.

`acceptance.json` is for people, `scenes.parquet` has every scene of every class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.meaning.answers import FIELDS
from ray_synth.prompting.contexts import kept_contexts
from ray_synth.storage.folder import Folder

ACCEPTANCE, SCENES = "acceptance.json", "scenes.parquet"
COLUMNS = ("kind", "style", "class_name")
NEEDED = [*COLUMNS, "prompt", "attempt", "reject_reason"]  # of the store
SCENE_SCHEMA = pa.schema(
    [
        ("class_name", pa.string()),
        *((field, pa.string()) for field in FIELDS),
        ("passed", pa.int64()),
        ("made", pa.int64()),
    ]
)
ENOUGH = 4  # images of a scene, before it is called one of a class's worst or best
FEW = 3  # of a class's scenes that are named so
MOST_PHRASES = 32  # of a field of all scenes, those that fail the most
Z = 1.959964  # of a 95% interval


class Acceptance:
    """Counts over tables of the store; of scenes as many as the plan has contextual prompts."""

    def __init__(self) -> None:
        self._made: dict[str, Counter[str]] = {name: Counter() for name in COLUMNS}
        self._passed: dict[str, Counter[str]] = {name: Counter() for name in COLUMNS}
        self._scenes: dict[tuple[str, str], list[int]] = {}  # (class, prompt) -> passed, made

    def add(self, table: pa.Table) -> None:
        """Count rows (columns `NEEDED`); one without a reason has passed.

        Each attempt counts: a row that passed at its third seed is 1 of 3.
        """
        attempts = pc.add(pc.fill_null(table["attempt"], 0), 1)
        passed = pc.cast(pc.equal(table["reject_reason"], ""), pa.int64())
        table = table.append_column("made", attempts).append_column("passed", passed)
        sums = [("passed", "sum"), ("made", "sum")]
        for name in COLUMNS:
            for row in table.group_by(name).aggregate(sums).to_pylist():
                self._made[name][row[name]] += row["made_sum"]
                self._passed[name][row[name]] += row["passed_sum"]
        scenes = table.filter(pc.equal(table["kind"], "contextual"))
        for row in scenes.group_by(["class_name", "prompt"]).aggregate(sums).to_pylist():
            counts = self._scenes.setdefault((row["class_name"], row["prompt"]), [0, 0])
            counts[0] += row["passed_sum"]
            counts[1] += row["made_sum"]

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

    def scenes(self, contexts: dict[str, Any]) -> pa.Table:
        """(`SCENE_SCHEMA`) what each contextual prompt said of its scene; a phrase that it had no room
        for is empty.

        Args:
            contexts: the classes of contexts.json.
        """
        counts: dict[tuple[str, ...], list[int]] = {}
        for (name, prompt), (passed, made) in self._scenes.items():
            written = [item["context"] for item in contexts.get(name, {}).get("contexts", [])]
            found = counts.setdefault((name, *scene_at(prompt, written)[1]), [0, 0])
            found[0] += passed
            found[1] += made
        rows = [(*key, *found) for key, found in sorted(counts.items())]
        columns: Any = zip(*rows, strict=True) if rows else [[] for _ in SCENE_SCHEMA]
        return pa.table(
            dict(zip(SCENE_SCHEMA.names, map(list, columns), strict=True)), SCENE_SCHEMA
        )

    def save(self, run: Folder) -> None:
        """Write both files into the run's `quality/`."""
        found: dict[str, Any] = self.as_dict()
        scenes = self.scenes(kept_contexts(run))
        for field in FIELDS:
            pairs = least_accepted({field: by_phrase(scenes, field)}, field, MOST_PHRASES)
            found[field] = {phrase: [passed, made] for phrase, passed, made in pairs}
        found["scenes"] = extremes(scenes)
        run.child("quality").write_table(SCENES, scenes)
        run.child("quality").write_json(ACCEPTANCE, found)


def by_phrase(scenes: pa.Table, field: str) -> dict[str, list[int]]:
    """phrase -> [passed, made] over all classes, of one field of `SCENE_SCHEMA`."""
    said = scenes.filter(pc.not_equal(scenes[field], ""))
    sums = said.group_by(field).aggregate([("passed", "sum"), ("made", "sum")])
    return {row[field]: [row["passed_sum"], row["made_sum"]] for row in sums.to_pylist()}


def extremes(scenes: pa.Table) -> dict[str, dict[str, list[list[Any]]]]:
    """class -> `worst` and `best` -> [scene, passed, made, low, high] of at most `FEW` scenes.

    Those are the worst whose interval ends lowest, and the best whose interval begins highest, so that
    few images do not make an extreme; the two lists do not overlap.
    """
    by_class: dict[str, list[list[Any]]] = {}
    for row in scenes.filter(pc.greater_equal(scenes["made"], ENOUGH)).to_pylist():
        text = scene_text(row)
        low, high = (round(float(bound), 3) for bound in wilson(row["passed"], row["made"]))
        found = [text, row["passed"], row["made"], low, high]
        by_class.setdefault(row["class_name"], []).append(found)
    result = {}
    for name, rows in by_class.items():
        few = min(FEW, len(rows) // 2)
        worst = sorted(rows, key=lambda row: (row[4], row[0]))[:few]
        rest = [row for row in rows if row not in worst]
        result[name] = {
            "worst": worst,
            "best": sorted(rest, key=lambda row: (-row[3], row[0]))[:few],
        }
    return result


def wilson(passed: Any, made: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95% interval of shares (Wilson 1927); of 0 images it is (0, 1).

    Args:
        passed, made: numbers, or arrays of one shape.
    """
    passed, made = np.asarray(passed, float), np.asarray(made, float)
    share = passed / np.maximum(made, 1)
    middle = (passed + Z**2 / 2) / (made + Z**2)
    half = Z / (made + Z**2) * np.sqrt(made * share * (1 - share) + Z**2 / 4)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def least_accepted(found: dict[str, Any], column: str, most: int) -> list[tuple[str, int, int]]:
    """(value, passed, made) of a column, those first of which the most fail for sure."""
    rows = [(value, passed, made) for value, (passed, made) in (found.get(column) or {}).items()]
    _, upper = wilson([row[1] for row in rows], [row[2] for row in rows])
    ordered = sorted(zip(upper.tolist(), rows, strict=True))
    return [row for _, row in ordered[:most]]


def scene_text(scene: Mapping[str, Any]) -> str:
    """A scene as records name it: its phrases, in the order of the fields."""
    return ", ".join(scene[field] for field in FIELDS if scene.get(field))


def scene_at(prompt: str, contexts: Sequence[Mapping[str, str]]) -> tuple[int, tuple[str, ...]]:
    """Which context a prompt says the most of, and its phrases by field, empty where the prompt had no
    room for one; -1, and no phrase, where it says nothing of any."""
    text = f"{prompt}, "
    best, most = -1, ("",) * len(FIELDS)
    for at, context in enumerate(contexts):
        phrases = [context.get(field, "") for field in FIELDS]
        said = tuple(phrase if phrase and f", {phrase}, " in text else "" for phrase in phrases)
        if sum(map(bool, said)) > sum(map(bool, most)):
            best, most = at, said
    return best, most
