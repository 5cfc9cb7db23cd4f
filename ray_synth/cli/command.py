"""The command `ray-synth`: one verb a stage, and the few that look around."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_synth.cli import images as run_cli
from ray_synth.cli import serving as serve_cli
from ray_synth.cli import submission as submit_cli
from ray_synth.cli.explanation import explain
from ray_synth.cluster import signals
from ray_synth.config import Config, load_config
from ray_synth.errors import UserError
from ray_synth.monitoring import logs

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
    from ray_synth.pipeline.runner import run_pipeline

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

    from ray_synth.cluster.connection import runs_folder
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
        from ray_synth.monitoring.mlflow_run import tracking_uri

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
            raise UserError("--checkpoint, --pretrained and --name go with --model")
        _run(settings, "evaluation", force_stage)
        _done(settings, "stages/evaluation.json")
        return
    from rich.console import Console

    from ray_synth.cluster.connection import runs_folder
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
        raise UserError(f"--seeds {seeds!r}: give whole numbers, such as 0,1,2") from None
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
    from ray_synth.cli.setup import describe, write_config

    found = write_config(images, out, test=test, name=name)
    typer.echo(describe(found, out))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option("--config", "-c")] = None,
    overrides: Overrides = None,
    estimate: Probe = False,
) -> None:
    """Print versions, devices and cluster resources, and what of a config would not fit."""
    from ray_synth.cli.doctor import diagnose

    if estimate and config is None:
        raise UserError("--estimate goes with --config: there is nothing to estimate")
    settings = load_config(config, overrides) if config else None
    lines, fits = diagnose(settings, estimate=estimate)
    typer.echo("\n".join(lines))
    if not fits:
        raise typer.Exit(1)


run_cli.register(app)
submit_cli.register(app)


def _done(settings: Config, name: str) -> None:
    from ray_synth.cluster.connection import runs_folder

    typer.echo(f"wrote {runs_folder(settings.runs_dir).child(settings.name).address(name)}")


def prepare_process() -> None:
    """Logging, and what must be in the environment before torch is loaded (see cluster.py)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logs.set_up()
    signals.stop_on_sigterm()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command and of `jobs/run.py`.

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
