"""What the models scored, side by side, and what the synthetic images gained. Pure; no Ray.

metrics.json in; rows for the page, and the same table for a terminal, out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

IN_DOMAIN = "in_domain"
# Baseline -> what a gain over it is a gain over, for people.
BASELINES = {
    "real_only": (
        "real only (matched baseline)",
        "The baseline is matched: the same recipe with the same number of real images in each of the "
        "same number of steps, without synthetic ones.",
    ),
    "recipe": (
        "the published recipe (baseline: recipe)",
        "The baseline is the published recipe on real images alone: its own batch, rates and epochs.",
    ),
}
MODELS = (
    (("real_only",), "Real only", ""),
    (("recipe",), "Published recipe", ""),
    (("mixed", "main"), "Real + synthetic", "main BN"),
    (("mixed", "aux"), "Real + synthetic", "auxiliary BN"),
    (("mixed", "average"), "Real + synthetic", "average of both BNs"),
    (("mixed", "blend"), "Real + synthetic", "blend of both BNs, chosen on validation"),
)


def test_set_label(name: str) -> str:
    """A test set's name as people read it."""
    return "in domain" if name == IN_DOMAIN else f"{name} (OOD)"


def comparison_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per model that was tested; models and test sets that are missing are left out.

    Returns:
        Rows of `model`, `bn` (empty where there is one set of statistics only), `label`, `results`
        (test set -> its entry of metrics.json, in domain first), `baseline` (whether it is one),
        `gains` (test set -> `gain` over the first baseline; no entry where there is nothing to compare
        with) and `more_gains` (over the published recipe, where a matched baseline is there as well).
    """
    over = baseline_of(metrics)
    baseline = _by_test_set(metrics.get(over)) if over else {}
    mixed = metrics.get("mixed") or {}
    has_aux = any(mixed.get(bn) for bn in ("aux", "average", "blend"))
    rows = []
    for path, model, statistics in MODELS:
        node: Any = metrics
        for part in path:
            node = (node or {}).get(part)
        results = _by_test_set(node)
        if not results:
            continue
        bn = statistics if has_aux else ""
        gains = {
            name: result.get("gain") or gain(result, baseline[name])
            for name, result in results.items()
            if path[0] not in BASELINES and name in baseline
        }
        more = {n: r["gain_over_recipe"] for n, r in results.items() if "gain_over_recipe" in r}
        rows.append(
            {
                "model": model,
                "bn": bn,
                "label": f"{model}, {bn}" if bn else model,
                "baseline": path[0] in BASELINES,
                "results": results,
                "gains": gains,
                "more_gains": more,
            }
        )
    return rows


def baseline_of(metrics: dict[str, Any]) -> str | None:
    """The baseline that gains are over: the matched one, else the published recipe; None without any."""
    return next((name for name in BASELINES if metrics.get(name)), None)


def test_sets(rows: list[dict[str, Any]]) -> list[str]:
    """Every test set of some rows, in domain first."""
    return list(dict.fromkeys(name for row in rows for name in row["results"]))


def gain(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The difference in top-1, in points, with a 95% interval.

    The interval is Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, method 10),
    which follows from the two Wilson intervals alone. It takes the two models' answers as
    independent; on the same test images they mostly agree, so it errs on the wide side. It knows
    nothing of how much another training seed would move either model.

    Returns:
        `top1`, `interval` [low, high], and `verdict`: gain | loss | unclear (the interval holds 0).
    """
    difference = after["top1"] - before["top1"]
    (after_low, after_high), (before_low, before_high) = (
        after["top1_interval"],
        before["top1_interval"],
    )
    low = difference - math.hypot(after["top1"] - after_low, before_high - before["top1"])
    high = difference + math.hypot(after_high - after["top1"], before["top1"] - before_low)
    verdict = "gain" if low > 0 else "loss" if high < 0 else "unclear"
    return {"top1": difference, "interval": [low, high], "verdict": verdict}


def signed(value: float, digits: int = 1) -> str:
    """+1.3, −0.4, 0.0: with a true minus, and no sign on what rounds to nothing."""
    text = f"{abs(value):.{digits}f}"
    if not text.strip("0."):
        return text
    return ("+" if value > 0 else "−") + text


def comparison_table(metrics: dict[str, Any]) -> Table:
    """The comparison as a rich table, for the end of a run in a terminal."""
    from rich.table import Table
    from rich.text import Text

    rows = comparison_rows(metrics)
    names = test_sets(rows)
    over = baseline_of(metrics)
    gains = f"\ngains over {BASELINES[over][0]}" if over else ""
    table = Table(title=Text(f"{metrics.get('run', 'run')}: top-1 % [95% interval]{gains}"))
    table.add_column("model")
    for name in names:
        images = max(row["results"][name]["images"] for row in rows if name in row["results"])
        # Text, not str: a test set's name is the user's, and may hold rich's markup.
        table.add_column(Text(f"{test_set_label(name)}\n{images:,} images"), justify="right")
    for row in rows:
        cells = [
            _cell(*(row[part].get(name) for part in ("results", "gains", "more_gains")))
            for name in names
        ]
        table.add_row(Text(row["label"]), *cells, end_section=True)
    return table


def _cell(
    result: dict[str, Any] | None, found: dict[str, Any] | None, more: dict[str, Any] | None
) -> Any:
    from rich.text import Text

    if result is None:
        return Text("–")
    low, high = result["top1_interval"]
    text = Text(f"{result['top1']:.1f} [{low:.1f}, {high:.1f}]\ntop-5 {result['top5']:.1f}")
    if result.get("shots"):
        text.append("\n" + shots_text(result["shots"]))
    for one, over in ((found, ""), (more, "over the recipe\n")):
        if one:
            colour = {"gain": "green", "loss": "red", "unclear": "default"}[one["verdict"]]
            span = ", ".join(signed(end) for end in one["interval"])
            text.append(f"\n{over}{signed(one['top1'])} [{span}]", style=colour)
    return text


def shots_text(shots: dict[str, dict[str, Any]]) -> str:
    """`many 63.1, medium 40.2, few 12.9`: top-1 of classes by how many training images they have."""
    return ", ".join(f"{group} {found['top1']:.1f}" for group, found in shots.items())


def _by_test_set(node: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """A model's results by test set, in domain first."""
    if not node:
        return {}
    results = {IN_DOMAIN: node[IN_DOMAIN]} if node.get(IN_DOMAIN) else {}
    return {**results, **{name: found for name, found in (node.get("ood") or {}).items() if found}}


def result_table(model: str, results: dict[str, dict[str, Any]]) -> Table:
    """One model's results for a terminal, one row per test set."""
    from rich.table import Table

    table = Table(title=model, title_justify="left")
    for column in (
        "test set",
        "images",
        "top-1",
        "95% interval",
        "top-5",
        "calibration error",
        "NLL",
    ):
        table.add_column(column, justify="left" if column == "test set" else "right")
    for test_set, result in results.items():
        low, high = result["top1_interval"]
        table.add_row(
            test_set_label(test_set),
            f"{result['images']:,}",
            f"{result['top1']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{result['top5']:.1f}",
            f"{result['ece']:.1f}",
            f"{result['nll']:.3f}",
        )
    return table
