"""What rounds cost beside a plan that is fixed: as many images and as many steps, in turn in one run."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

from ray_synth.config import Config, PracticeConfig
from ray_synth.pipeline.api import Run, train
from ray_synth.storage.folder import Folder

SHARE = 0.02  # of a round that the loop may take


def seconds_of(config: Config) -> float:
    """Run up to the mixed model; the time of its images and its training, and of what is between them."""
    train(config)
    stages = Run(config).folder.child("stages")
    trained = stages.read_json("training.json")["result"]["seconds"]["mixed"]
    made = stages.read_json("generation.json") if stages.exists("generation.json") else None
    return float(trained) + float(made["seconds"] if made else 0.0)


def rounds_cost(
    config: Config, feeds: list[str], *, rounds: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """By feed: what each round after the first takes more than the same images and steps at once.

    Args:
        config: of the runs; validation images are what each round asks about.
        rounds: of the plan in rounds; steered by nothing, so that both make images of the same prompts.
        repeats: runs of each, in turn.
    """
    alone = PracticeConfig(rounds=rounds, by_class=False, by_kind=False, apart=None, contexts=False)
    found: dict[str, dict[str, Any]] = {}
    for feed in feeds:
        taken: dict[str, list[float]] = {"fixed": [], "rounds": []}
        for repeat in range(repeats):
            for name, practice in (("fixed", None), ("rounds", alone)):
                with tempfile.TemporaryDirectory() as runs:
                    taken[name].append(seconds_of(_settled(config, feed, practice, runs)))
                print(f"{feed}, {name}, {repeat + 1}: {taken[name][-1]:.1f} s", flush=True)
        fixed, many = (statistics.median(each) for each in taken.values())
        a_round = max(0.0, (many - fixed) / (rounds - 1))
        found[feed] = {
            "fixed_s": round(fixed, 1),
            "rounds_s": round(many, 1),
            "s_per_round": round(a_round, 2),
            f"minutes_for_{SHARE:.0%}": round(a_round / SHARE / 60, 1),
        }
    return found


def _settled(config: Config, feed: str, practice: PracticeConfig | None, runs: str) -> Config:
    training = config.training.model_copy(update={"feed": feed})
    prompting = config.prompting.model_copy(update={"practice": practice})
    changes = {"runs_dir": Folder(runs).uri, "training": training, "prompting": prompting}
    return config.model_copy(update=changes)
