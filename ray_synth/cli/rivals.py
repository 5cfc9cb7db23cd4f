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


def retrieve(
    pool: Annotated[
        str,
        typer.Argument(metavar="POOL", help="a folder of other real images, or of WebDataset tars"),
    ],
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[
        str | None, typer.Option("--out", help="where to; default: retrieved/ in the run")
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option(min=1, help="images of each class; default: as the plan would have"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take the images of a pool that are nearest to each class by CLIP; `import` reads what is left."""
    from ray_synth.pipeline.retrieval import retrieve_images

    settings = load_config(config, overrides)
    with stoppable():
        found = retrieve_images(settings, pool, to=out, per_class=per_class)
    if as_json:
        say_json(found)
        return
    words = shlex.join(
        ["import", found["folder"], "--format", "webdataset", "--config", str(config)]
    )
    say(
        f"{sum(found['retrieved'].values()):,} of {found['images']:,} images, for "
        f"{len(found['retrieved'])} classes; {sum(found['copies_left_out'].values()):,} near-copies left "
        f"out, {found['unreadable']:,} unreadable",
        f"images: {found['folder']}",
        f"train on them, in a run of another name: ray-synth {words} --set name=retrieved",
    )


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command()(tune)
    app.command()(retrieve)
