"""How accuracy grows with synthetic images, shared and dual BN: `python jobs/scaling.py`.

For each seed one run makes the plan and its images; every scale trains on a prefix of that plan, from
the finished store, with the same steps and the same real images. Continues where it was killed. Writes
`scaling.json`, `scaling.md` and `scaling.png` into the folder given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer

from ray_synth.cli import prepare_process
from ray_synth.config import Config, load_config

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
REAL_ONLY = "real_only"


def main(
    config: Annotated[Path, typer.Option("--config", "-c")] = QUICKSTART,
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    scales: Annotated[str, typer.Option(help="synthetic images per real one")] = "1,2,4,6,12",
    out: Annotated[Path, typer.Option(help="folder for table and plot")] = Path("docs/images"),
    overrides: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Train real only, and at each scale with shared and with dual BN; table and plot of all seeds."""
    sizes = sorted(int(part) for part in scales.split(","))
    found = {}
    for seed in (int(part) for part in seeds.split(",")):
        settings = load_config(
            config,
            [
                f"prompting.multiplier={sizes[-1]}",
                "training.feed=stored",
                "evaluation.bns=[main, aux, average]",
                *(overrides or []),
                f"seed={seed}",
                f"name=scaling-seed{seed}",
            ],
        )
        found[seed] = run_seed(settings, sizes)
    rows = table_rows(found)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scaling.json").write_text(json.dumps({"seeds": found, "rows": rows}, indent=1))
    (out / "scaling.md").write_text(markdown(rows) + "\n")
    plot(rows, out / "scaling.png")
    print(markdown(rows))


def run_seed(config: Config, sizes: list[int]) -> dict[str, dict[str, float]]:
    """Top-1 in percent by arm and test set, the dual arms' by BN."""
    from ray_synth.cluster import connect
    from ray_synth.data.dataset import drop
    from ray_synth.evaluation.predictor import evaluate
    from ray_synth.pipeline import open_run, run_pipeline
    from ray_synth.training.job import TrainJob, total_steps
    from ray_synth.training.trainer import run_training

    run_pipeline(config, until="generation")
    run = open_run(config)
    results = f"scaling-{run.stages.digest('training')}.json"
    known: dict[str, dict[str, float]] = (
        run.folder.read_json(results) if run.folder.exists(results) else {}
    )
    train = drop(run.train, (run.stages.record("data") or {})["result"]["corrupt"])
    arms = {REAL_ONLY: (0, False)}
    for size in sizes:
        arms |= {f"shared_{size}x": (size, False), f"dual_{size}x": (size, True)}
    with connect(config.cluster):
        for arm, (size, dual_bn) in arms.items():
            if any(name.split(".")[0] == arm for name in known):
                continue
            training = config.training.model_copy(update={"dual_bn": dual_bn})
            job = TrainJob(
                arm=arm,
                config=training,
                steps=total_steps(training, len(train)),
                class_names=train.class_names,
                seed=config.seed,
                folder=run.folder,
                real=train,
                max_pixels=config.data.max_pixels,
                num_synthetic=size * len(train),
            )
            run_training(job, run.generation_job(), real=train, run_name=f"{arm}-{results[:-5]}")
            tested = evaluate(
                run.tests,
                folder=run.folder,
                arms=[arm],
                config=config.evaluation,
                class_names=train.class_names,
                max_pixels=config.data.max_pixels,
            )[0]
            for (model, test_set), result in tested.items():
                known.setdefault(model, {})[test_set] = result["top1"]
            run.folder.write_json(results, known)
            print(f"seed {config.seed}, {arm}: {shown(known, arm)}", flush=True)
    return known


def shown(known: dict[str, dict[str, float]], arm: str) -> str:
    return "; ".join(
        f"{model.partition('.')[2] or 'main'} BN "
        + ", ".join(f"{test_set} {top1:.1f}" for test_set, top1 in tests.items())
        for model, tests in known.items()
        if model.split(".")[0] == arm
    )


def table_rows(found: dict[int, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Means over seeds with 95% t intervals: of top-1, and of the gain over real only."""
    models = next(iter(found.values()))
    rows = []
    for model in models:
        arm, _, bn = model.partition(".")
        kind, _, size = arm.partition("_")
        for test_set in sorted(models[model], key=lambda name: (name != "in_domain", name)):
            top1 = np.array([seed[model][test_set] for seed in found.values()])
            base = np.array([seed[REAL_ONLY][test_set] for seed in found.values()])
            rows.append(
                {
                    "training": "real only" if arm == REAL_ONLY else f"{kind} BN",
                    "scale": 0 if arm == REAL_ONLY else int(size.removesuffix("x")),
                    "bn": bn or "main",
                    "test_set": test_set,
                    "top1": top1.tolist(),
                    "mean": float(top1.mean()),
                    "half": half_interval(top1),
                    "gain": float((top1 - base).mean()),
                    "gain_half": half_interval(top1 - base),
                }
            )
    return rows


def half_interval(values: np.ndarray) -> float:
    """Half the width of the mean's 95% interval, by Student's t."""
    from scipy import stats

    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def markdown(rows: list[dict[str, Any]]) -> str:
    """One row a training, scale and BN; for each test set the mean and the gain."""
    test_sets = list(dict.fromkeys(row["test_set"] for row in rows))
    head = [f"{name}, top-1 | gain over real only" for name in test_sets]
    lines = [
        "| training | synthetic | BN at test | " + " | ".join(head) + " |",
        "|---|---|---|" + "---|---|" * len(test_sets),
    ]
    cells: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        key = (row["training"], row["scale"], row["bn"])
        gain = f"{row['gain']:+.1f} ± {row['gain_half']:.1f}" if row["scale"] else ""
        cells.setdefault(key, []).append(f"{row['mean']:.1f} ± {row['half']:.1f} | {gain}")
    for (training, scale, bn), columns in cells.items():
        lines.append(f"| {training} | {scale}x | {bn} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Top-1 by scale, one panel a test set, with intervals."""
    from matplotlib.figure import Figure

    test_sets = list(dict.fromkeys(row["test_set"] for row in rows))
    figure = Figure(figsize=(5 * len(test_sets), 3.8), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(test_sets), squeeze=False)[0]
    styles = {
        ("shared BN", "main"): ("shared BN", "#c2620a", "s--"),
        ("dual BN", "main"): ("dual BN, main at test", "#2557d6", "o-"),
        ("dual BN", "aux"): ("dual BN, auxiliary at test", "#0f9d76", "^-"),
        ("dual BN", "average"): ("dual BN, average at test", "#8b5cf6", "v:"),
    }
    for axis, test_set in zip(axes, test_sets, strict=True):
        mine = [row for row in rows if row["test_set"] == test_set]
        base = next(row for row in mine if not row["scale"])
        axis.axhline(base["mean"], color="#6b7280", linestyle=":", label="real only")
        for (training, bn), (label, colour, style) in styles.items():
            line = [r for r in mine if (r["training"], r["bn"]) == (training, bn)]
            if line:
                axis.errorbar(
                    [r["scale"] for r in line],
                    [r["mean"] for r in line],
                    yerr=[r["half"] for r in line],
                    fmt=style,
                    color=colour,
                    label=label,
                    capsize=3,
                    markersize=4,
                )
        axis.set_xscale("log", base=2)
        scales = sorted({row["scale"] for row in mine if row["scale"]})
        axis.set_xticks(scales, [f"{scale}x" for scale in scales])
        axis.set(title=test_set, xlabel="synthetic images per real one", ylabel="top-1 (%)")
        axis.set_ylim(max(0.0, min(row["mean"] for row in mine) - 10), 100)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    prepare_process()
    typer.run(main)
