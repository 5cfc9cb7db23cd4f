"""Does the label check find what an eye finds? `python jobs/label_check.py`.

300 of the quickstart's generated digits, a hundred per kind of prompt, were labelled by eye before their
class was looked at: which digit is to be seen, or none. Precision and recall of each check are of the
images that do not show their class. Ends with a Markdown table, and a last line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer

SEEN = Path(__file__).resolve().parents[1] / "tests" / "generation" / "seen_by_eye.parquet"
REAL_PER_CLASS = 5  # as the quickstart has
CHECKS = {
    "thresholds": {"scores": True, "labels": False},
    "label check": {"scores": False, "labels": True},
    "both": {"scores": True, "labels": True},
}


def main() -> None:
    """Measure, and print."""
    found = measure()
    print("| check | prompts | fail | precision | recall | right of those that pass |")
    print("|---|---|---:|---:|---:|---:|")
    for row in found:
        shares = (row["failed"], row["precision"], row["recall"], row["right_of_passed"])
        print(
            f"| {row['check']} | {row['kind']} | " + " | ".join(f"{x:.0%}" for x in shares) + " |"
        )
    print(json.dumps({"verb": "label_check", "rows": found}))


def measure() -> list[dict[str, Any]]:
    """One row per check and kind of prompt; "none" passes all."""
    import pyarrow.parquet as pq

    from ray_synth.data.images import decode_image
    from ray_synth.generation.quality import Judge
    from ray_synth.meaning.clip import ClipModel

    rows = pq.read_table(SEEN).to_pylist()
    for at, row in enumerate(rows):
        row["sample_id"] = str(at)
    pictures = [decode_image(row["image"]) for row in rows]
    clip = ClipModel("embedded")
    reference = _reference(clip)
    failed = {"none": np.zeros(len(rows), bool)}
    for check, options in CHECKS.items():
        verdicts = Judge(reference, clip, **options).judge(rows, pictures)
        failed[check] = np.array([verdict.reason != "" for verdict in verdicts])
    wrong = np.array([row["seen"] != row["class_index"] for row in rows])
    kinds = np.array([row["kind"] for row in rows])
    groups = {kind: kinds == kind for kind in ("plain", "contextual", "stylized")}
    groups["all"] = np.ones(len(rows), bool)
    return [
        {"check": check, "kind": kind, **_figures(fail[some], wrong[some])}
        for check, fail in failed.items()
        for kind, some in groups.items()
    ]


def _figures(failed: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    caught = (failed & wrong).sum()
    shares = {
        "failed": failed.mean(),
        "precision": caught / failed.sum() if failed.any() else 0.0,
        "recall": caught / wrong.sum(),
        "right_of_passed": (~wrong[~failed]).mean(),
    }
    return {name: round(float(share), 4) for name, share in shares.items()}


def _reference(clip: Any) -> Any:
    """Measured on the quickstart's real images."""
    from PIL import Image

    from ray_synth.data.digits import CLASS_NAMES, load_digits
    from ray_synth.generation.thresholds import measure_reference

    pixels, names = load_digits("digits", "train")
    labels = np.array([CLASS_NAMES.index(name) for name in names])
    first = {c: np.flatnonzero(labels == c)[:REAL_PER_CLASS] for c in range(len(CLASS_NAMES))}
    images = {c: [Image.fromarray(pixels[row]) for row in rows] for c, rows in first.items()}
    texts = {c: f"the number {c}" for c in images}
    return measure_reference(images, texts, clip)


if __name__ == "__main__":
    typer.run(main)
