"""The tables of `jobs/meanings.py`: what was right, and how far confidence can be believed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_synth.evaluation.accuracy import BINS, interval


@dataclass(frozen=True)
class Verdict:
    """One answer, judged.

    Attributes:
        class_name: what was asked about.
        choice: the chosen meaning.
        right: whether it is the one shown or spoken of.
        confidence, ambiguous: as `rank_meanings` gives them.
        num_senses: given senses for each that is right.
        source: who gave the choice: "user", "llm", or "name" for the bare class name.
    """

    class_name: str
    choice: str
    right: bool
    confidence: float
    ambiguous: bool
    num_senses: float
    source: str


def summary(found: dict[str, list[Verdict]]) -> dict[str, dict[str, Any]]:
    """Figures of each test, of all pictures, and of all that had only given senses."""
    given = [v for name, verdicts in found.items() if "LLM" not in name for v in verdicts]
    shown = [v for name, some in found.items() if _of_pictures(name) for v in some]
    whole = {"all pictures": shown, "all with given senses": given}
    return {name: totals(v) for name, v in {**found, **whole}.items() if v}


def _of_pictures(test: str) -> bool:
    return "LLM" not in test and not test.startswith(("digits", "contexts"))


def totals(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Accuracy with its 95% Wilson interval, chance, and calibration; shares in percent."""
    right = np.array([verdict.right for verdict in verdicts])
    confidence = np.array([verdict.confidence for verdict in verdicts])
    ambiguous = np.array([verdict.ambiguous for verdict in verdicts])

    def part(mask: np.ndarray) -> dict[str, int]:
        return {"answers": int(mask.sum()), "right": int(right[mask].sum())}

    return {
        **part(np.ones(len(right), dtype=bool)),
        "accuracy": _percent(right.mean()),
        "interval": [round(end, 1) for end in interval(int(right.sum()), len(right))],
        "chance": _percent(sum(1 / verdict.num_senses for verdict in verdicts) / len(verdicts)),
        "bare_name": sum(verdict.source == "name" for verdict in verdicts),
        "confidence": _percent(confidence.mean()),
        "ece": _percent(calibration_error(confidence, right)),
        "sure": part(~ambiguous),
        "ambiguous": part(ambiguous),
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error, 0..1: |confidence - accuracy| over equal bins, by their sizes."""
    places = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(places, confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(right))


def markdown(found: dict[str, list[Verdict]], used: dict[str, Any]) -> str:
    """The totals, and every picture."""
    head = (
        "| test | answers | right | 95% interval | chance | mean confidence | calibration error | "
        "right where sure | right where ambiguous |"
    )
    rows = [head, "|---|" + "---:|" * 8]
    for name, figures in summary(found).items():
        low, high = figures["interval"]
        rows.append(
            f"| {name} | {figures['answers']} | {figures['accuracy']:.1f}% | {low:.1f} to {high:.1f} "
            f"| {figures['chance']:.1f}% | {figures['confidence']:.1f}% | {figures['ece']:.1f} "
            f"| {_part(figures['sure'])} | {_part(figures['ambiguous'])} |"
        )
    used_text = ", ".join(f"{key} {value}" for key, value in used.items())
    pictures = [
        "| name | chosen of the given senses | right | confidence "
        "| chosen with the LLM's phrases beside them | right | confidence |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {alone.class_name} | {_answer(alone)} | {_answer(both)} |"
            for alone, both in zip(*list(found.values())[:2], strict=True)
        ),
    ]
    return "\n".join([f"Measured with {used_text}.", "", *rows, "", *pictures])


def _answer(verdict: Verdict) -> str:
    by = {"llm": " (LLM)", "name": " (bare name)"}.get(verdict.source, "")
    doubt = ", ambiguous" if verdict.ambiguous else ""
    return (
        f"{verdict.choice}{by} | {'yes' if verdict.right else 'no'} "
        f"| {verdict.confidence:.2f}{doubt}"
    )


def _part(part: dict[str, int]) -> str:
    return f"{part['right']} of {part['answers']}" if part["answers"] else "–"


def _percent(share: float) -> float:
    return round(100 * float(share), 1)
