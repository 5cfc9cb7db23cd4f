"""Small real runs of the command, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
# The quickstart with two classes and few steps; everything in it is as real as in the whole.
SMALL = [
    "data.class_names=[six, seven]",
    "data.train.class_map={six: six, seven: seven}",
    "data.test.class_map={six: six, seven: seven}",
    "data.ood.uci_digits.class_map={six: six, seven: seven}",
    "data.train.images_per_class=4",
    "data.test.images_per_class=20",
    "data.ood.uci_digits.images_per_class=20",
    "meaning.num_meanings=2",
    "meaning.num_images=4",
    "meaning.retries=0",
    "prompting.contexts_per_class=3",
    "prompting.multiplier=8",
    "generation.batch_size=8",
    "generation.num_inference_steps=2",
    "training.steps=30",
    "training.batch_size=16",
    "training.checkpoint_every=5",
]
# The same without the language model and the quality checks, for tests of what comes after them.
NO_LLM = ["meaning.enabled=false", "prompting.mix={plain: 1}", "generation.checks.policy=off"]


def line(*arguments: str) -> list[str]:
    """The command `ray-synth`, of the folder that it is started in."""
    return [sys.executable, "-m", "ray_synth.cli", *arguments]


def sets(*settings: str) -> list[str]:
    return [item for setting in settings for item in ("--set", setting)]


def arguments(verb: str, runs: Path, *settings: str) -> list[str]:
    """A verb on the quickstart's config, with its runs and some settings elsewhere."""
    return [verb, "--config", str(QUICKSTART), *sets(f"runs_dir={runs}", *settings)]


def command(verb: str, runs: Path, *settings: str) -> list[str]:
    return line(*arguments(verb, runs, *settings))


def run(line: list[str], *, timeout: float = 570) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def stored_ids(run_folder: Path) -> list[str]:
    """The ids in the store, one for each time that an image was made."""
    parts = sorted((run_folder / "images").glob("part-*.parquet"))
    return [
        i
        for part in parts
        for i in pq.read_table(part, columns=["sample_id"])["sample_id"].to_pylist()
    ]


def planned_ids(run_folder: Path) -> list[str]:
    return pq.read_table(run_folder / "plan.parquet")["sample_id"].to_pylist()
