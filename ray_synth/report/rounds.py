"""The rounds of a run as the page shows them: what was weak, what was made for it, what came of it."""

from __future__ import annotations

from typing import Any

from ray_synth.evaluation.stopping import gains
from ray_synth.prompting.rounds import examples_file, read_rounds, scores_file
from ray_synth.storage.folder import Folder
from ray_synth.training.scores import unpacked

WEAK = 5  # classes of a round
STYLES = 3
PAIRS = 6


def rounds_of(folder: Folder) -> list[dict[str, Any]]:
    """What the page shows of each round; empty for a run without rounds.

    Returns:
        `round`, `images`; `steps`, `top1` in percent on `set`, and its `change` over the round before
        (`paired_gain`), where the learner was scored; `weak`: classes that were the weakest, each with
        its images and its error in percent before and after; `kinds`, `styles`, `pairs`,
        `new_contexts` and `steered` of what was made; `examples`: rows with an image.
    """
    cards = read_rounds(folder)
    scores = [
        folder.read_json(scores_file(number)) if folder.exists(scores_file(number)) else None
        for number in range(len(cards))
    ]
    found = []
    for number, card in enumerate(cards):
        before, after = scores[number - 1] if number else None, scores[number]
        name = examples_file(number)
        found.append(
            {
                "round": number,
                "images": card["rows"],
                **_result(before, after),
                "weak": _weak(card, before, after),
                **_made_for(card),
                "examples": folder.read_table(name).to_pylist() if folder.exists(name) else [],
            }
        )
    return found


def _result(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    if after is None:
        return {"steps": None, "top1": None, "set": "", "change": None}
    real = after["real"]
    rights = [
        unpacked(s["real"]["right"], s["real"]["looked_at"])
        for s in (before, after)
        if s is not None
    ]
    return {
        "steps": after["steps"],
        "top1": 100 * float(rights[-1].mean()),
        "set": real["set"],
        "change": gains(rights)[0] if before is not None else None,
    }


def _weak(
    card: dict[str, Any], before: dict[str, Any] | None, after: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The weakest classes, as the learner said before the round; none of round 0."""
    weakness = card.get("weakness", {})
    names = sorted(weakness, key=lambda name: -weakness[name])[:WEAK]
    errors = [
        {item["class_name"]: item.get("error") for item in s["real"]["classes"]} if s else {}
        for s in (before, after)
    ]
    return [
        {
            "name": name,
            "images": card["budgets"][name],
            **{
                key: None if known.get(name) is None else 100 * known[name]
                for key, known in zip(("before", "after"), errors, strict=True)
            },
        }
        for name in names
    ]


def _made_for(card: dict[str, Any]) -> dict[str, Any]:
    """Shares of kinds in percent, the styles that were drawn the most, pairs told apart, new scenes."""
    mix, styles = card.get("mix", {}), card.get("styles", {})
    whole = sum(mix.values()) or 1
    most = sorted(styles, key=lambda name: -styles[name])[:STYLES]
    differ = len(set(styles.values())) > 1
    return {
        "kinds": [(kind, 100 * share / whole) for kind, share in mix.items()],
        "styles": most if differ else [],
        "pairs": list(card.get("confused", {}).items())[:PAIRS],
        "new_contexts": card.get("new_contexts", []),
        "steered": _steered(card.get("steering") or {}),
    }


def _steered(steering: dict[str, Any]) -> list[str]:
    """What the learner did in the making of the images, by `Steering.facts`."""
    found = []
    if guidance := steering.get("guidance"):
        found.append(f"guided towards what the model is unsure of (scale {guidance['scale']:g})")
    if factor := steering.get("factor"):
        found.append(f"of {factor} images each the hardest that is right")
    return found
