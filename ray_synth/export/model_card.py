"""The card of a pushed model: what it is, how to use it, what it scored, and how it was made.

Weights, metrics.json and the run's config in; a README.md with a Hugging Face header out.
"""

from __future__ import annotations

from typing import Any

from ray_synth.config import read_run_config, run_versions
from ray_synth.errors import UserError
from ray_synth.export.card import CLASSES_SHOWN, environment, images_origin, public_text
from ray_synth.export.weights import Weights
from ray_synth.report.page import FACTS
from ray_synth.report.table import (
    BASELINES,
    baseline_of,
    comparison_rows,
    signed,
    test_set_label,
)
from ray_synth.storage.folder import Folder

BNS = {"main": "main BN", "aux": "auxiliary BN", "average": "average of both BNs"}
# What a reader wants to know of a training besides the page's facts.
MORE = (
    ("Recipe", "training.recipe"),
    ("Optimizer", "training.optimizer.name"),
    ("Learning rate", "training.optimizer.lr"),
    ("Synthetic images per real one", "prompting.multiplier"),
)


def model_card(
    weights: Weights, repo: str, *, licence: str | None = None, images_url: str | None = None
) -> str:
    """The text of README.md.

    Args:
        repo: OWNER/NAME that the model is pushed to.
        licence: identifier for the header; default `other`.
        images_url: of the data set with the run's images, where they are pushed as well.
    """
    run = weights.folder
    metrics = run.read_json("metrics.json") if run.exists("metrics.json") else {}
    rows = comparison_rows(metrics)
    config = read_run_config(run)
    over = baseline_of(metrics)
    results = _results(rows, weights)
    card = weights.card
    names = card["class_names"]
    return (
        environment()
        .get_template("model_card.md.j2")
        .render(
            header=_header(weights, licence, results),
            run=run.name,
            repo=repo,
            model=card["model"],
            arm=weights.arm,
            has_bns=len(card["bns"]) > 1,
            bn_label=f"the {BNS[weights.bn]}",
            num_real=metrics.get("num_real"),
            num_synthetic=card["num_synthetic"],
            images_repo=repo if images_url else None,
            images_url=images_url,
            results=results,
            baseline=BASELINES[over][0] if over else None,
            facts=_facts(config, card),
            versions=run_versions(run),
            classes=names[:CLASSES_SHOWN],
            classes_left_out=max(0, len(names) - CLASSES_SHOWN),
            licence=licence,
            models=_models(run) if weights.arm == "mixed" else [],
        )
    )


def _header(weights: Weights, licence: str | None, results: list[dict[str, Any]]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    header = ModelCardData(
        license=licence or "other",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "ray-synth"],
        model_name=weights.folder.name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="ray-synth",
                dataset_name=row["test_set"],
                dataset_config=row["test_set"],  # else the header keeps the last of them alone
                metric_type="accuracy",
                metric_value=round(row["top1"] / 100, 4),
                metric_name="top-1",
            )
            for row in results
            if row["this"]
        ]
        or None,
    )
    return header.to_yaml().strip()


def _results(rows: list[dict[str, Any]], weights: Weights) -> list[dict[str, Any]]:
    """One row per model and test set; `this`: it is the model of these weights."""
    models = {"mixed": "Real + synthetic", "real_only": "Real only", "recipe": "Published recipe"}
    found = []
    for row in rows:
        this = row["model"] == models.get(weights.arm) and row["bn"] in ("", BNS[weights.bn])
        for name, result in row["results"].items():
            low, high = result["top1_interval"]
            gain = row["gains"].get(name)
            span = f" [{', '.join(signed(end) for end in gain['interval'])}]" if gain else ""
            found.append(
                {
                    "label": row["label"],
                    "this": this,
                    "test_set": test_set_label(name),
                    "images": result["images"],
                    "top1": result["top1"],
                    "low": low,
                    "high": high,
                    "gain": f"{signed(gain['top1'])}{span}" if gain else "",
                }
            )
    return found


def _facts(config: dict[str, Any], card: dict[str, Any]) -> list[tuple[str, Any]]:
    values = [(label, _dig(config, key)) for label, key in (*FACTS, *MORE)]
    size = card["image_size"]
    values += [("Steps", card["steps"]), ("Image size", f"{size} x {size}")]
    return [(label, public_text(value)) for label, value in values if value is not None]


def _models(run: Folder) -> list[tuple[str, str]]:
    try:
        return images_origin(run)
    except UserError:  # the store was cleared: the model is worth a card all the same
        return []


def _dig(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
