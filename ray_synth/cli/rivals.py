"""Verbs that make what a run is to be held against: a tuned generator, retrieved real images."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ray_synth.cli.output import AsJson, say, say_json
from ray_synth.cli.running import QUICKSTART, ConfigPath, Overrides, stoppable
from ray_synth.config import load_config


def tune(
    config: ConfigPath = QUICKSTART,
    overrides: Overrides = None,
    out: Annotated[
        str | None, typer.Option("--out", help="the adapter's folder; default: tuned/ in the run")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tune a LoRA of the image model on the real training images; for comparison (settings: tuning)."""
    from ray_synth.pipeline.tuning import tune_generator

    settings = load_config(config, overrides)
    with stoppable():
        found = tune_generator(settings, out)
    if as_json:
        say_json(found)
        return
    loss = found["loss"]["values"]
    adapters = [*found["adapters"], found["folder"]]
    words = shlex.join(["--set", f"generation.adapters=[{', '.join(adapters)}]"])
    say(
        f"tuned on {found['images']['count']:,} training images of {len(found['captions'])} classes; "
        f"loss {loss[0]:.4f} at first, {loss[-1]:.4f} in the end",
        f"adapter: {found['folder']}",
        f"generate with it, in a run of another name: {words}",
    )


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command()(tune)
