"""The stage "evaluation" of a run whose images are not all made: `python -m rehearsal.evaluation`.

The command itself makes every planned image first, which at this size an hour does not allow.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ray_synth.cluster.connection import connect
from ray_synth.config import load_config
from ray_synth.pipeline.runner import opened
from ray_synth.pipeline.steps import evaluate_models


def main(
    config: str,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value")] = None,
) -> None:
    """Test the models that there are, on all test images."""
    settings = load_config(config, overrides)
    with opened(settings) as run, connect(settings.cluster):
        evaluate_models(run)


if __name__ == "__main__":
    typer.run(main)
