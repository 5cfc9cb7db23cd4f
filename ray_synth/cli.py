"""The command `ray-synth`: one verb a stage, and the few that look around."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_synth import logs, serve_cli, signals, submit_cli
from ray_synth.config import Config, load_config

app = typer.Typer(
    name="ray-synth",
    help="Better image classifiers from synthetic images, at cluster scale.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(serve_cli.app, name="serve", no_args_is_help=True)
ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="a YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a setting: a.b=value", metavar="A.B=V")
]
Force = Annotated[
    str | None, typer.Option("--force-stage", help="do this stage and all later ones again")
]
QUICKSTART = Path("jobs/configs/quickstart.yaml")


Probe = Annotated[
    bool,
    typer.Option("--estimate", help="probe first: seconds, device hours and cost of each stage"),
]


@app.callback()
def common(
    log_format: Annotated[
        str | None, typer.Option(help="text, or json: an object a line", envvar=logs.VARIABLE)
    ] = None,
) -> None:
    """Better image classifiers from synthetic images, at cluster scale."""
    logs.set_up(log_format)


def _run(
    config: Config, until: str, force_stage: str | None, *, estimate: bool = False
) -> dict[str, Any]:
    from ray_synth.pipeline import run_pipeline

    with _stoppable():
        return run_pipeline(config, until=until, force_stage=force_stage, estimate=estimate)


@contextmanager
def _stoppable() -> Iterator[None]:
    """A block that Ctrl-C and SIGTERM may end; typer would end in silence."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; what was made is kept, and the same command continues", err=True)
        raise


@app.command()
def run(
    config: ConfigPath = QUICKSTART,
    overrides: Overrides = None,
    force_stage: Force = None,
    estimate: Probe = False,
) -> None:
    """Run all stages, then print what was gained."""
    from rich.console import Console

    from ray_synth.cluster import runs_folder
    from ray_synth.report.table import comparison_table

    settings = load_config(config, overrides)
    metrics = _run(settings, "report", force_stage, estimate=estimate)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(comparison_table(metrics))
    console.print(_stage_table(metrics))
    console.print(
        f"{metrics['num_real']} real and {metrics['num_synthetic']} synthetic images; generation "
        f"{metrics['images_per_second']['generation']:.1f} images/s; training waited for data "
        f"{100 * metrics['stall_fraction']:.1f}% of its time",
        highlight=False,
    )
    runs = runs_folder(settings.runs_dir)
    folder = runs.child(settings.name)
    console.print(f"report:  {folder.address('report/index.html')}", soft_wrap=True)
    console.print(f"metrics: {folder.address('metrics.json')}", soft_wrap=True)
    if settings.tracking.enabled:
        from ray_synth.tracking import tracking_uri

        uri = tracking_uri(settings, runs)
        console.print(f"MLflow:  mlflow ui --backend-store-uri {uri}", soft_wrap=True)


def _stage_table(metrics: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Where the time went", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, seconds in metrics["seconds"].items():
        part = stage.startswith("training_")
        if stage != "total":
            table.add_row(f"  {stage}" if part else stage, f"{seconds:.1f}")
    table.add_row("total", f"{metrics['seconds']['total']:.1f}", style="bold")
    return table


@app.command()
def disambiguate(
    config: ConfigPath = QUICKSTART, overrides: Overrides = None, force_stage: Force = None
) -> None:
    """Resolve what each class name means, and stop."""
    settings = load_config(config, overrides)
    _run(settings, "meaning", force_stage)
    _done(settings, "meanings.json")


@app.command()
def plan(
    config: ConfigPath = QUICKSTART, overrides: Overrides = None, force_stage: Force = None
) -> None:
    """Write the prompts of all images, and stop."""
    settings = load_config(config, overrides)
    _run(settings, "plan", force_stage)
    _done(settings, "plan.parquet")


@app.command()
def generate(
    config: ConfigPath = QUICKSTART, overrides: Overrides = None, force_stage: Force = None
) -> None:
    """Make all images of the plan, and stop."""
    settings = load_config(config, overrides)
    _run(settings, "generation", force_stage)
    _done(settings, "images")


@app.command()
def train(
    config: ConfigPath = QUICKSTART, overrides: Overrides = None, force_stage: Force = None
) -> None:
    """Train the baseline and the mixed model, and stop."""
    settings = load_config(config, overrides)
    _run(settings, "training", force_stage)
    _done(settings, "models")


@app.command()
def evaluate(
    config: ConfigPath = QUICKSTART,
    overrides: Overrides = None,
    force_stage: Force = None,
    model: Annotated[
        str | None, typer.Option(help="test this timm model instead of the run's own")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="its weights, safetensors")] = None,
    pretrained: Annotated[bool, typer.Option(help="with timm's own weights")] = False,
    name: Annotated[str | None, typer.Option(help="names the results")] = None,
) -> None:
    """Test the trained models, or any timm checkpoint, and stop."""
    settings = load_config(config, overrides)
    if model is None:
        if checkpoint or pretrained or name:
            raise ValueError("--checkpoint, --pretrained and --name go with --model")
        _run(settings, "evaluation", force_stage)
        _done(settings, "stages/evaluation.json")
        return
    from rich.console import Console

    from ray_synth.cluster import runs_folder
    from ray_synth.evaluation.checkpoint import evaluate_checkpoint
    from ray_synth.report.table import result_table

    folder = runs_folder(settings.runs_dir).child(settings.name).child("evaluations")
    results = evaluate_checkpoint(
        settings, folder, model=model, checkpoint=checkpoint, pretrained=pretrained, name=name
    )
    Console().print(result_table(model, results))


@app.command()
def report(config: ConfigPath = QUICKSTART, overrides: Overrides = None) -> None:
    """Write the report of a finished run again."""
    settings = load_config(config, overrides)
    _run(settings, "report", None)
    _done(settings, "report/index.html")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="ablation, scaling, ...; or all")],
    config: ConfigPath = QUICKSTART,
    overrides: Overrides = None,
    seeds: Annotated[
        str | None, typer.Option(help="comma-separated, instead of the config's")
    ] = None,
) -> None:
    """Answer one question by a grid of runs: a table, a plot and a page."""
    from ray_synth.studies.study import run_studies

    settings = load_config(config, overrides)
    try:
        chosen = [int(part) for part in seeds.split(",")] if seeds else None
    except ValueError:
        raise ValueError(f"--seeds {seeds!r}: give whole numbers, such as 0,1,2") from None
    with _stoppable():
        folder = run_studies(name, settings, seeds=chosen)
    if name != "all":
        typer.echo(folder.read_bytes(f"{name}/table.md").decode())
    typer.echo(f"page:    {folder.address('index.html')}")


@app.command()
def init(
    images: Annotated[Path, typer.Option(help="a folder of class folders with images")],
    out: Annotated[Path, typer.Option(help="the config to write")] = Path("ray_synth.yaml"),
    test: Annotated[Path | None, typer.Option(help="a test folder; default: images/test")] = None,
    name: Annotated[str | None, typer.Option(help="the run's name")] = None,
) -> None:
    """Look at a folder of images and write a config for it."""
    from ray_synth.setup import describe, write_config

    found = write_config(images, out, test=test, name=name)
    typer.echo(describe(found, out))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option("--config", "-c")] = None,
    overrides: Overrides = None,
    estimate: Probe = False,
) -> None:
    """Print versions, devices and cluster resources, and what of a config would not fit."""
    from ray_synth.doctor import diagnose

    if estimate and config is None:
        raise ValueError("--estimate goes with --config: there is nothing to estimate")
    settings = load_config(config, overrides) if config else None
    lines, fits = diagnose(settings, estimate=estimate)
    typer.echo("\n".join(lines))
    if not fits:
        raise typer.Exit(1)


RunFolder = Annotated[str, typer.Option("--run", "-r", help="a run's directory, or its URI")]
Names = Annotated[list[str] | None, typer.Option("--class", help="only this class; repeatable")]
Kinds = Annotated[
    list[str] | None, typer.Option("--kind", help="only plain, contextual or stylized")
]


@app.command()
def regenerate(
    sample_id: Annotated[str, typer.Argument(help="an image's id, or the start of one")],
    run_folder: RunFolder = "runs/quickstart",
    out: Annotated[Path | None, typer.Option(help="where to write the image")] = None,
) -> None:
    """Make one image again from its row alone, and compare it with the one in the store."""
    from ray_synth.generation.regenerate import regenerate as again

    found = again(_opened(run_folder), sample_id)
    path = out or Path(f"{found.row['sample_id']}.{found.suffix}")
    path.write_bytes(found.image)
    typer.echo(found.describe())
    typer.echo(f"wrote {path}")
    if not found.identical:
        raise typer.Exit(1)


@app.command()
def status(
    run_folder: Annotated[str, typer.Argument(help="a run's directory, or its URI")] = (
        "runs/quickstart"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    watch: Annotated[
        float | None, typer.Option(help="look again every so many seconds, until it runs no longer")
    ] = None,
) -> None:
    """Say how a run stands, from its directory alone; exit code 0 done, 3 running, 4 neither."""
    from ray_synth.status_view import show_status
    from ray_synth.storage import Folder

    raise typer.Exit(show_status(Folder(run_folder), as_json=as_json, watch=watch))


@app.command()
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
    from ray_synth.report.sheet import sheet_of

    sheet = sheet_of(
        _opened(run_folder), class_names=class_names, kinds=kinds, style=style, rejected=rejected,
        sample_ids=sample_ids, limit=limit, columns=columns,
    )  # fmt: skip
    sheet.save(out)
    typer.echo(f"wrote {out}")


@app.command()
def export(
    to: Annotated[str, typer.Argument(help="an empty folder, or its URI")],
    run_folder: RunFolder = "runs/quickstart",
    layout: Annotated[str, typer.Option(help="imagefolder, webdataset or huggingface")] = (
        "imagefolder"
    ),
    class_names: Names = None,
    kinds: Kinds = None,
    rejected: Annotated[bool, typer.Option(help="rejected images as well")] = False,
    limit: Annotated[int | None, typer.Option(help="images at most")] = None,
    shard_rows: Annotated[int, typer.Option(help="images a shard, at most")] = 10_000,
    licence: Annotated[str | None, typer.Option(help="for the card")] = None,
) -> None:
    """Write a run's images as a data set with a card, for other tools."""
    from ray_synth.generation.export import export_images

    counts = export_images(
        _opened(run_folder), to, layout=layout, accepted_only=not rejected,
        class_names=class_names, kinds=kinds, limit=limit, shard_rows=shard_rows, licence=licence,
    )  # fmt: skip
    typer.echo(
        f"wrote {counts['exported']:,} images of {len(counts['classes'])} classes to {counts['to']}"
        + (f"; {counts['unreadable']} could not be read" if counts["unreadable"] else "")
    )


submit_cli.register(app)


def _opened(run_folder: str) -> Any:
    """The folder of a run. Raises ValueError where its storage does not answer at once."""
    from ray_synth.storage import Folder

    folder = Folder(run_folder)
    folder.check_readable()
    return folder


def _done(settings: Config, name: str) -> None:
    from ray_synth.cluster import runs_folder

    typer.echo(f"wrote {runs_folder(settings.runs_dir).child(settings.name).address(name)}")


def explain(error: BaseException) -> str | None:
    """One clear message for an error that a user can mend; None for all others.

    Ray wraps what its workers raise: the user's ValueError is looked for inside.
    """
    from ray_synth.filesystems import storage_problem

    seen: set[int] = set()
    pending: list[Any] = [error]
    while pending:
        current = pending.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        full = isinstance(current, OSError) and current.errno == errno.ENOSPC
        if full or f"[Errno {errno.ENOSPC}]" in str(current):
            where = re.search(r"No space left on device: '([^']+)'", str(current))
            return (
                f"no space left on the disk ({where[1] if where else 'while writing'}); free some "
                "and run the same command again: what was finished is kept"
            )
        if isinstance(current, OSError) and (problem := storage_problem(current)):
            return f"{problem}. Run the same command again: what was finished is kept"
        if type(current) is ValueError or type(current).__name__ == "RayTaskError(ValueError)":
            cause = getattr(current, "cause", None)
            return str(cause if isinstance(cause, ValueError) else current).strip()
        # An error that crossed processes twice is left as text alone.
        crossed = str(current) if type(current).__name__.startswith("RayTaskError") else ""
        remote = re.findall(r"^ValueError: (.+)$", crossed, re.MULTILINE)
        if remote:
            return str(remote[-1]).strip()
        stalled = re.search(r"no progress for at least (\d+)s", str(current))
        if stalled:
            return (
                f"generation stalled: no image was made for {stalled[1]} s. Either no worker has the "
                "CPUs and GPUs that generation.num_cpus and num_gpus ask for (see `ray status`), or "
                "a batch takes longer than that: raise cluster.no_progress_timeout_s. What was made "
                "is kept; the same command continues"
            )
        failures = getattr(current, "worker_failures", None)
        pending += list(failures.values()) if isinstance(failures, dict) else []
        pending += [getattr(current, "cause", None), current.__cause__]
    return None


def prepare_process() -> None:
    """Logging, and what must be in the environment before torch is loaded (see cluster.py)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logs.set_up()
    signals.stop_on_sigterm()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command and of `jobs/*.py`.

    Exits with 0, 2 for what the user can mend, 1 for the rest, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        prepare_process()
        submit_cli.check_version()
        app(arguments, standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(signals.exit_code())
    except SystemExit as end:
        if end.code == signals.INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            sys.exit(signals.exit_code())
        raise
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get("RAY_SYNTH_DEBUG"):
            raise
        if logs.is_json():
            logging.getLogger("ray_synth").error(message)
        else:
            typer.secho(f"error: {message}", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
