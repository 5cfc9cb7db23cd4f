"""The same run over several seeds, and what was gained on average: `python jobs/seeds.py`.

A seed decides which real images are taken, the LLM's samples, the plan, every image, and training. Each
seed is a run of its own, so that a killed study goes on where it was. Ends with a Markdown table.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from ray_synth.cli.command import prepare_process
from ray_synth.config import load_config
from ray_synth.pipeline.runner import run_pipeline
from ray_synth.report.table import comparison_rows

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main(
    config: Annotated[Path, typer.Option("--config", "-c")] = QUICKSTART,
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    overrides: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Run the config once per seed and print the means."""
    numbers = [int(seed) for seed in seeds.split(",")]
    name = load_config(config, overrides).name
    found = {}
    for seed in numbers:
        settings = load_config(
            config, [*(overrides or []), f"seed={seed}", f"name={name}-seed{seed}"]
        )
        found[seed] = run_pipeline(settings)
    print(markdown(found))
    print(json.dumps(summary(found)))


def accuracies(metrics: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(model, test set) -> top-1."""
    return {
        (row["label"], test_set): result["top1"]
        for row in comparison_rows(metrics)
        for test_set, result in row["results"].items()
    }


def markdown(found: dict[int, dict[str, Any]]) -> str:
    """One row per model and test set, one column per seed, and their mean and standard deviation."""
    tables = {seed: accuracies(metrics) for seed, metrics in found.items()}
    lines = [
        "| model | test set | "
        + " | ".join(f"seed {seed}" for seed in tables)
        + " | mean ± s.d. |",
        "|---|---|" + "---|" * (len(tables) + 1),
    ]
    for key in next(iter(tables.values())):
        values = [table[key] for table in tables.values()]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells = " | ".join(f"{value:.1f}" for value in values)
        lines.append(
            f"| {key[0]} | {key[1]} | {cells} | {statistics.mean(values):.1f} ± {spread:.1f} |"
        )
    return "\n".join(lines)


def summary(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean top-1 by model and test set."""
    tables = [accuracies(metrics) for metrics in found.values()]
    return {
        "verb": "seeds",
        "seeds": list(found),
        "mean_top1": {
            " / ".join(key): round(statistics.mean(table[key] for table in tables), 3)
            for key in tables[0]
        },
    }


if __name__ == "__main__":
    prepare_process()
    typer.run(main)
