"""The report page: what a run directory holds, as one self-contained HTML file.

Every part of the run may be missing; the page shows what there is and never loads anything.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ray_synth.config import read_run_config, run_versions
from ray_synth.data.images import encode_image
from ray_synth.errors import UserError, duration
from ray_synth.generation.acceptance import ACCEPTANCE, least_accepted
from ray_synth.generators.licences import DISCLAIMER, LICENCES
from ray_synth.meaning.entries import MEANINGS, read_meanings
from ray_synth.report import plots
from ray_synth.report.rounds import rounds_of
from ray_synth.report.sheet import choose_examples, choose_refused, kinds_of, thumbnail
from ray_synth.report.table import (
    BASELINES,
    baseline_of,
    comparison_rows,
    shots_text,
    signed,
    test_set_label,
    test_sets,
)
from ray_synth.stages import times
from ray_synth.storage.folder import Folder
from ray_synth.storage.secrets import redact
from ray_synth.training.published import published_result

if TYPE_CHECKING:
    from PIL import Image

PAGE = "report/index.html"
PREVIEW = "preview.json"
ARMS = {"real_only": "Real only", "recipe": "Published recipe", "mixed": "Mixed"}
MAIN_BN = ("", "main BN")  # how rows of comparison_rows name it
CLASSES_SHOWN = (
    20  # in the contact sheet, in the meanings before the fold, and per end of a ranking
)
RANKED = 10  # styles, classes and parts of scenes of which the most images fail
THUMBNAIL = 128  # pixels; shown at half of that, for dense screens
# What a reader wants to know of a config at a glance; the whole of it is on the page as well.
FACTS = (
    ("Generator", "generation.model"),
    ("Sampling steps", "generation.num_inference_steps"),
    ("Guidance scale", "generation.guidance_scale"),
    ("Classifier", "training.model"),
    ("Feed", "training.feed"),
    ("Dual BN", "training.dual_bn"),
    ("Weight of the synthetic loss (λ)", "training.lambda_synth"),
    ("Batch (real + synthetic)", "training.batch_size"),
    ("Share of real images in a batch", "training.real_fraction"),
    ("LLM", "meaning.llm.model"),
    ("CLIP", "meaning.clip.model"),
    ("Seed", "seed"),
)


def write_report(folder: Folder) -> str:
    """Write `report/index.html` of a run; its address.

    Raises:
        UserError: the folder holds no run.
    """
    folder.write_bytes(PAGE, render_report(folder).encode())
    return folder.address(PAGE)


def render_report(folder: Folder) -> str:
    """The page of a run as HTML text.

    Raises:
        UserError: the folder holds neither config.yaml nor metrics.json.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if not (folder.exists("config.yaml") or folder.exists("metrics.json")):
        raise UserError(
            f"{folder.address()} holds no run: neither config.yaml nor metrics.json is there; give the "
            "directory that `ray-synth run` wrote, such as runs/quickstart"
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # class names, prompts and LLM answers come from strangers
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "signed": signed,
        "duration": duration,
        "test_set_label": test_set_label,
        "shots": shots_text,
        "thousands": lambda value: f"{value:,}" if isinstance(value, int) else value,
    }
    return environment.get_template("page.html.j2").render(read_run(folder))


def read_run(folder: Folder) -> dict[str, Any]:
    """All that the template shows; parts that the run lacks are empty."""
    metrics = _json(folder, "metrics.json") or {}
    kept = folder.exists("config.yaml")
    config = read_run_config(folder) if kept else {}
    arms = {arm: found for arm in ARMS if (found := _json(folder, f"models/{arm}.json"))}
    examples = choose_examples(folder, max_classes=CLASSES_SHOWN)
    rows = comparison_rows(metrics)
    entries = read_meanings(folder) if folder.exists(MEANINGS) else []
    return {
        "name": metrics.get("run") or config.get("name") or "run",
        "metrics": metrics,
        "rows": rows,
        "test_sets": test_sets(rows),
        "headlines": headlines(rows),
        "baseline": BASELINES.get(baseline_of(metrics) or ""),
        "published": published(config, metrics, len(entries)),
        "arm_labels": ARMS,
        "kinds": kinds_of(examples),
        "classes": example_classes(examples),
        "num_classes": len(entries) or len({row["class_index"] for row in examples}),
        "rounds": rounds(folder),
        "practice": metrics.get("practice"),
        "meanings": meanings(entries),
        "meanings_shown": CLASSES_SHOWN,
        "has_studies": folder.exists("studies/index.html"),
        "plots": curve_plots({arm: found.get("curve") or [] for arm, found in arms.items()}),
        "arms": arms,
        "overlapped": _dig(config, "training.feed") in ("live", "lockstep"),
        "by_class": class_gains(rows),
        "calibration": calibration(rows),
        "stages": stage_times(metrics.get("seconds") or {}),
        "total_seconds": (metrics.get("seconds") or {}).get("total"),
        "aside": set_aside(metrics, arms),
        "generation": generation_facts(metrics),
        "preview": None if metrics else _json(folder, PREVIEW),
        "acceptance": acceptance(folder),
        "refused": refused(folder),
        "facts": [
            (label, value) for label, key in FACTS if (value := _dig(config, key)) is not None
        ],
        "config": redact(yaml.safe_dump(config, sort_keys=False, allow_unicode=True)),
        "versions": run_versions(folder) if kept else {},
        "taken_over": metrics.get("taken_over"),
        "licences": _json(folder, LICENCES) or [],
        "disclaimer": DISCLAIMER,
    }


def headlines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per test set: the mixed model (main BN) against the baseline, and the other BN beside.

    Without a baseline there is no gain; then `before` and `gain` are None.
    """
    main = next((row for row in rows if not row["baseline"] and row["bn"] in MAIN_BN), None)
    if main is None:
        return []
    before = next((row for row in rows if row["baseline"]), None)
    aux = next((row for row in rows if row["bn"] == "auxiliary BN"), None)
    return [
        {
            "test_set": name,
            "after": result,
            "before": before["results"].get(name) if before else None,
            "gain": main["gains"].get(name),
            "aux": aux["results"].get(name) if aux else None,
            "aux_gain": aux["gains"].get(name) if aux else None,
        }
        for name, result in main["results"].items()
    ]


def published(
    config: dict[str, Any], metrics: dict[str, Any], num_classes: int
) -> tuple[float, str, float | None] | None:
    """Top-1 that the recipe's authors report, where, and what the run's baseline has, if any."""
    found = published_result(config.get("training") or {}, num_classes)
    if found is None:
        return None
    own = _dig(metrics, f"{baseline_of(metrics)}.in_domain.top1")
    return found.top1, found.source, own


def example_classes(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The example images by class and kind, each with a data URI; unreadable ones are left out."""
    classes: dict[int, dict[str, Any]] = {}
    for row in examples:
        picture = thumbnail(row["image"], THUMBNAIL)
        if picture is None:
            continue
        entry = classes.setdefault(
            row["class_index"], {"name": row["class_name"], "meaning": row["meaning"], "kinds": {}}
        )
        shown = {key: row[key] for key in ("prompt", "style", "seed", "clip_score")}
        uri = data_uri(picture)
        entry["kinds"].setdefault(row["kind"], []).append(
            {**shown, "uri": uri, "tiny": max(picture.size) <= 32}
        )
    return list(classes.values())


def rounds(folder: Folder) -> list[dict[str, Any]]:
    """The rounds of a run, each with a few of its images as data URIs; unreadable ones are left out."""
    found = rounds_of(folder)
    for item in found:
        shown = []
        for row in item["examples"]:
            picture = thumbnail(row.pop("image"), THUMBNAIL)
            if picture is not None:
                shown.append({**row, "uri": data_uri(picture), "tiny": max(picture.size) <= 32})
        item["examples"] = shown
    return found


def data_uri(picture: Image.Image) -> str:
    """A picture as the page holds it: PNG where it is small, else WebP."""
    kind = "png" if max(picture.size) <= 64 else "webp"
    data = encode_image(picture, image_format=kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def meanings(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of meanings.json, candidates best first, the one that was chosen marked.

    Where there are too many to show at once, the narrowest margins come first.
    """
    shown = []
    for entry in entries:
        candidates = sorted(
            entry.get("candidates") or [],
            key=lambda c: -c["score"] if c.get("score") is not None else float("inf"),
        )
        marked = next((c for c in candidates if c["meaning"] == entry.get("choice")), None)
        shown.append(
            {
                "class_name": entry["class_name"],
                "choice": entry.get("choice"),
                "margin": entry.get("margin"),
                "num_images": entry.get("num_images"),
                "candidates": [
                    {
                        "meaning": c["meaning"],
                        "score": c.get("score"),
                        "source": c.get("source"),
                        "chosen": c is marked,
                    }
                    for c in candidates
                ],
            }
        )
    if len(shown) > CLASSES_SHOWN:
        shown.sort(key=lambda e: float("inf") if e["margin"] is None else e["margin"])
    return shown


def curve_plots(curves: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """The plots, each drawn for light and for dark, with the last values as alt text."""
    drawings = (
        ("Training loss", plots.loss_plot, plots.LOSS, 1, 3),
        ("Training top-1", plots.accuracy_plot, plots.ACCURACY, 100, 1),
    )
    made = []
    for title, draw, lines, scale, digits in drawings:
        light = draw(curves)
        if light is None:
            continue
        last = [
            f"{line.label} {points[-1][line.key] * scale:.{digits}f} at step {points[-1]['step']}"
            for line in lines
            if (points := [p for p in curves.get(line.arm) or [] if p.get(line.key) is not None])
        ]
        made.append(
            {
                "light": light,
                "dark": draw(curves, dark=True) or light,
                "alt": f"{title} by step. At the end: {'; '.join(last)}.",
            }
        )
    return made


def class_gains(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """In-domain top-1 by class, real only and mixed, most gained first; the middle left out."""
    by_model = {
        row["model"]: row["results"]["in_domain"].get("by_class") or {}
        for row in rows
        if row["bn"] in MAIN_BN and "in_domain" in row["results"]
    }
    before = next(
        (by_model[row["model"]] for row in rows if row["baseline"] and row["model"] in by_model), {}
    )
    after = by_model.get("Real + synthetic", {})
    both = [
        {
            "name": name,
            "before": before[name],
            "after": after[name],
            "gain": after[name] - before[name],
        }
        for name in after
        if name in before
    ]
    both.sort(key=lambda row: -row["gain"])
    left_out = max(0, len(both) - 2 * CLASSES_SHOWN)
    if left_out:
        both = both[:CLASSES_SHOWN] + both[-CLASSES_SHOWN:]
    return {"rows": both, "left_out": left_out}


def calibration(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far each model's confidence is from its accuracy; runs of earlier versions have none."""
    return [
        {
            "label": row["label"],
            "test_set": test_set_label(name),
            "top1": result["top1"],
            "ece": result["ece"],
            "nll": result["nll"],
        }
        for row in rows
        for name, result in row["results"].items()
        if "ece" in result
    ]


def stage_times(seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Stages and their parts with their seconds and their share of the longest."""
    rows = times(seconds)
    longest = max((value for _, _, value in rows), default=0) or 1
    return [
        {"label": label, "part": part, "seconds": value, "share": 100 * value / longest}
        for label, part, value in rows
    ]


def generation_facts(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What generation took and what its checks found, as labels and texts; what is unknown is left
    out."""
    facts = metrics.get("generation") or {}
    rate = _dig(metrics, "images_per_second.generation")
    hours = "gpu_hours" if facts.get("gpu_hours") else "cpu_hours"
    shown = (
        ("Images per second", rate, "{:,.1f}"),
        ("GPU-hours" if hours == "gpu_hours" else "CPU-hours", facts.get(hours), "{:,.2f}"),
        ("Cost", facts.get("cost") or None, "{:,.2f}"),
        ("Mean CLIP score", facts.get("clip_score"), "{:.3f}"),
        ("Images flagged", facts.get("flagged"), "{:,}"),
        ("Images made with a new seed", facts.get("retried") or None, "{:,}"),
        ("Near-duplicates in the store", facts.get("near_duplicates"), "{:,}"),
    )
    return [(label, form.format(value)) for label, value, form in shown if value is not None]


def acceptance(folder: Folder) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """What the checks let pass: (title, rows of value, passed and made), the fewest first."""
    found = _json(folder.child("quality"), ACCEPTANCE) or {}
    titles = {
        "kind": "Kinds of prompts", "style": "Styles", "class_name": "Classes",
        "foreground": "Foregrounds", "background": "Backgrounds", "lighting": "Lights",
        "camera_angle": "Camera angles",
    }  # fmt: skip
    tables = [(title, least_accepted(found, name, RANKED)) for name, title in titles.items()]
    return [(title, rows) for title, rows in tables if rows]


def refused(folder: Folder) -> list[dict[str, Any]]:
    """Some images that failed a check, each with a data URI and the reason."""
    shown = []
    for row in choose_refused(folder):
        picture = thumbnail(row["image"], THUMBNAIL)
        if picture is not None:
            shown.append({**row, "uri": data_uri(picture), "tiny": max(picture.size) <= 32})
    return shown


def set_aside(metrics: dict[str, Any], arms: dict[str, Any]) -> dict[str, Any]:
    """What the run did not use: images without a class, corrupt and rejected ones, contexts not from the
    LLM."""
    corrupt = metrics.get("corrupt") or {}
    train = [_corrupt(item) for item in corrupt.get("train") or []]
    known = {item["id"] for item in train}
    met = {item for found in arms.values() for item in found.get("corrupt") or []}
    train += [
        {"id": item, "error": "met in training"}
        for item in sorted(map(str, met))
        if item not in known
    ]
    test = corrupt.get("test") or []
    if isinstance(test, dict):  # by test set
        test = [item for items in test.values() for item in items]
    return {
        "train": train,
        "test": [_corrupt(item) for item in test],
        "left_out": metrics.get("left_out") or [],
        "rejected": metrics.get("rejected"),
        "reasons": metrics.get("reject_reasons") or {},
        "contexts": metrics.get("contexts") or {},
        "shortened": metrics.get("shortened") or {},
    }


def _corrupt(item: Any) -> dict[str, str]:
    if isinstance(item, dict):
        return {"id": str(item.get("image_id")), "error": str(item.get("error", ""))}
    return {"id": str(item), "error": ""}


def _json(folder: Folder, name: str) -> Any:
    return folder.read_json(name) if folder.exists(name) else None


def _dig(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values
