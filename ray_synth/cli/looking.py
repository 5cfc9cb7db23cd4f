"""Verbs that look: at images (init), a cluster (doctor), a run (status, show, export, regenerate)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_synth.cli import sharing
from ray_synth.cli.exit_codes import NO
from ray_synth.cli.output import AsJson, say, say_json
from ray_synth.cli.running import Overrides, Probe
from ray_synth.config import load_config
from ray_synth.errors import UserError

RunFolder = Annotated[str, typer.Option("--run", "-r", help="a run's directory, or its URI")]
Names = Annotated[list[str] | None, typer.Option("--class", help="only this class; repeatable")]
Kinds = Annotated[
    list[str] | None, typer.Option("--kind", help="only plain, contextual or stylized")
]


def init(
    images: Annotated[Path, typer.Option(help="a folder of class folders with images")],
    out: Annotated[Path, typer.Option(help="the config to write")] = Path("ray_synth.yaml"),
    test: Annotated[Path | None, typer.Option(help="a test folder; default: images/test")] = None,
    name: Annotated[str | None, typer.Option(help="the run's name")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at a folder of images and write a config for it."""
    from ray_synth.cli.setup import describe, write_config

    found = write_config(images, out, test=test, name=name)
    if as_json:
        say_json({**found, "config": str(out)})
    else:
        say(describe(found, out))


def doctor(
    config: Annotated[Path | None, typer.Option("--config", "-c")] = None,
    overrides: Overrides = None,
    estimate: Probe = False,
    as_json: AsJson = False,
) -> None:
    """Print versions, devices and cluster resources, and what of a config would not fit."""
    from ray_synth.cli.doctor import diagnose

    if estimate and config is None:
        raise UserError("--estimate goes with --config: there is nothing to estimate")
    settings = load_config(config, overrides) if config else None
    lines, figures = diagnose(settings, estimate=estimate)
    if as_json:
        say_json(figures)
    else:
        say(*lines)
    if figures["problems"]:
        raise typer.Exit(NO)


def estimate(
    config: Annotated[Path, typer.Option("--config", "-c", help="a YAML file")],
    images: Annotated[int, typer.Option(help="real training images")],
    classes: Annotated[int, typer.Option(help="their classes")],
    gpu: Annotated[str | None, typer.Option(help="A10G, A100-80G, H100, ...")] = None,
    with_studies: Annotated[bool, typer.Option("--studies", help="and of each study")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print what a run would take: GPU-hours, cost, TB, days, bottleneck. By arithmetic, without data or
    cluster; `doctor --estimate` measures.
    """
    from ray_synth.preflight import outlook
    from ray_synth.preflight.demands import Sizes
    from ray_synth.studies import outlook as of_studies

    if min(images, classes) < 1:
        raise UserError(f"{images} images of {classes} classes: give 1 or more of both")
    settings, sizes = load_config(config, overrides), Sizes(images, classes)
    found = outlook.outlook(settings, sizes, gpu)
    costs = of_studies.study_costs(settings, sizes, gpu) if with_studies else []
    if as_json:
        say_json({**found.as_dict(), "studies": [vars(cost) for cost in costs]})
        return
    say(*outlook.lines(found, settings.name))
    if costs:
        say(*of_studies.lines(costs, settings.cluster.price_per_gpu_hour))


def regenerate(
    sample_id: Annotated[str, typer.Argument(help="an image's id, or the start of one")],
    run_folder: RunFolder = "runs/quickstart",
    out: Annotated[Path | None, typer.Option(help="where to write the image")] = None,
    as_json: AsJson = False,
) -> None:
    """Make one image again from its row alone, and compare it with the one in the store."""
    from ray_synth.generation.regenerate import regenerate as again
    from ray_synth.pipeline.api import Run

    found = again(Run(run_folder).folder, sample_id)
    path = out or Path(f"{found.row['sample_id']}.{found.suffix}")
    _write(path, lambda: path.write_bytes(found.image))
    if as_json:
        say_json({**found.as_dict(), "wrote": str(path)})
    else:
        say(found.describe(), f"wrote {path}")
    if not found.identical:
        raise typer.Exit(NO)


def status(
    run_folder: Annotated[str, typer.Argument(help="a run's directory, or its URI")] = (
        "runs/quickstart"
    ),
    as_json: AsJson = False,
    watch: Annotated[
        float | None, typer.Option(help="look again every this many seconds, until the run ends")
    ] = None,
) -> None:
    """Say how a run stands, from its directory alone; exit code 0 done, 3 running, 4 neither."""
    from ray_synth.report.status_table import show_status
    from ray_synth.storage.folder import Folder

    raise typer.Exit(show_status(Folder(run_folder), as_json=as_json, watch=watch))


def show(
    run_folder: RunFolder = "runs/quickstart",
    class_names: Names = None,
    kinds: Kinds = None,
    style: Annotated[str | None, typer.Option(help="only this style")] = None,
    rejected: Annotated[
        bool | None, typer.Option("--rejected/--accepted", help="only these; default: both")
    ] = None,
    sample_ids: Annotated[list[str] | None, typer.Option("--id", help="only this image")] = None,
    limit: Annotated[int, typer.Option(help="images at most")] = 200,
    columns: Annotated[
        int | None, typer.Option(help="images of a kind side by side; default: 12 in all")
    ] = None,
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("contact_sheet.png"),
) -> None:
    """Draw a contact sheet of any slice of a run's images."""
    from ray_synth.pipeline.api import Run
    from ray_synth.report.sheet import sheet_of

    sheet = sheet_of(
        Run(run_folder).folder, class_names=class_names, kinds=kinds, style=style, rejected=rejected,
        sample_ids=sample_ids, limit=limit, columns=columns,
    )  # fmt: skip
    _write(out, lambda: sheet.save(out))
    say(f"wrote {out}")


def export(
    to: Annotated[str, typer.Argument(help="an empty folder, or its URI")],
    run_folder: RunFolder = "runs/quickstart",
    layout: Annotated[
        str,
        typer.Option(
            help="imagefolder, webdataset or huggingface",
            autocompletion=lambda: ["imagefolder", "webdataset", "huggingface"],
        ),
    ] = "imagefolder",
    class_names: Names = None,
    kinds: Kinds = None,
    rejected: Annotated[bool, typer.Option(help="rejected images as well")] = False,
    limit: Annotated[int | None, typer.Option(help="images at most")] = None,
    shard_rows: Annotated[int, typer.Option(help="images per shard, at most")] = 10_000,
    licence: Annotated[str | None, typer.Option(help="for the card")] = None,
    model: Annotated[
        str | None, typer.Option(help="the trained model instead: onnx, torch or timm")
    ] = None,
    weights: sharing.Chosen = None,
    check_on: Annotated[
        list[str] | None,
        typer.Option("--check-on", help="pictures to check the model on; default: test images"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's images as a data set with a card, or (--model) its trained model, for other tools."""
    from ray_synth.pipeline.api import Run

    if model:
        sharing.export_model(Run(run_folder).folder, to, model, weights, check_on)
        return
    if weights or check_on:
        raise UserError("--weights and --check-on go with --model")
    from ray_synth.export.layouts import export_images

    counts = export_images(
        Run(run_folder).folder, to, layout=layout, accepted_only=not rejected,
        class_names=class_names, kinds=kinds, limit=limit, shard_rows=shard_rows, licence=licence,
    )  # fmt: skip
    if as_json:
        say_json(counts)
        return
    say(
        f"wrote {counts['exported']:,} images of {len(counts['classes'])} classes to {counts['to']}"
        + (f"; {counts['unreadable']} could not be read" if counts["unreadable"] else "")
    )


def _write(path: Path, work: Callable[[], Any]) -> None:
    try:
        work()
    except (OSError, ValueError) as error:  # PIL: an unknown suffix
        raise UserError(f"--out {path} cannot be written: {error}") from None


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    for verb in (init, doctor, estimate, regenerate, status, show, export):
        app.command()(verb)
