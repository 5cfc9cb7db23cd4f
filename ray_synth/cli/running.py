"""Verbs that do the work: run and the verbs that stop earlier, and study."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_synth.config import Config, load_config
from ray_synth.errors import UserError
from ray_synth.stages import REPORT, STAGES, stage_of, times

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="a YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a setting: a.b=value", metavar="A.B=V")
]
Force = Annotated[
    str | None, typer.Option("--force-stage", help="do this stage and all later ones again")
]
Probe = Annotated[
    bool,
    typer.Option("--estimate", help="probe first: seconds, device hours and cost of each stage"),
]
Until = Annotated[
    str, typer.Option(help=f"stop after a stage: {', '.join(STAGES)}", metavar="STAGE")
]
QUICKSTART = Path("jobs/configs/quickstart.yaml")
# Verbs that stop early, and after which stage.
SHORTER = {"disambiguate": "meaning", "plan": "plan", "generate": "generation", "train": "training"}


@contextmanager
def stoppable() -> Iterator[None]:
    """A block that Ctrl-C and SIGTERM may end; typer would end in silence."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; what was made is kept, and the same command continues", err=True)
        raise


def _run(settings: Config, until: str, force_stage: str | None, **options: Any) -> dict[str, Any]:
    from ray_synth.pipeline.runner import run_pipeline

    with stoppable():
        return run_pipeline(settings, until=until, force_stage=force_stage, **options)


def run(
    config: ConfigPath = QUICKSTART,
    overrides: Overrides = None,
    force_stage: Force = None,
    estimate: Probe = False,
    until: Until = REPORT,
) -> None:
    """Run all stages, then print what was gained."""
    settings = load_config(config, overrides)
    metrics = _run(settings, until, force_stage, estimate=estimate)
    if until == REPORT:
        _print_results(settings, metrics)
    else:
        _say_written(settings, stage_of(until).shown)


def _print_results(settings: Config, metrics: dict[str, Any]) -> None:
    from rich.console import Console

    from ray_synth.cluster.connection import runs_folder
    from ray_synth.report.table import comparison_table

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
    console.print(f"report:  {folder.address('report/index.html')}", soft_wrap=True, markup=False)
    console.print(f"metrics: {folder.address('metrics.json')}", soft_wrap=True, markup=False)
    if settings.tracking.enabled:
        from ray_synth.monitoring.mlflow_run import tracking_uri

        uri = tracking_uri(settings, runs)
        command = shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
        console.print(f"MLflow:  {command}", soft_wrap=True, markup=False)


def _stage_table(metrics: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Where the time went", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for label, part, seconds in times(metrics["seconds"]):
        table.add_row(f"  {label}" if part else label, f"{seconds:.1f}")
    table.add_row("total", f"{metrics['seconds']['total']:.1f}", style="bold")
    return table


def preview(
    config: ConfigPath = QUICKSTART,
    overrides: Overrides = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="default: 2 per class and kind, 240 at most")
    ] = None,
    force_stage: Force = None,
) -> None:
    """Draw the first images of a run, and say what the whole would take, on one page."""
    from ray_synth.pipeline.preview import preview as look

    settings = load_config(config, overrides)
    with stoppable():
        found = look(settings, images=images, force_stage=force_stage)
    kind = "GPU" if found["gpu_hours"] else "CPU"
    typer.echo(
        f"{found['images']} of {found['planned']:,} planned images, {found['passed']} passed the "
        f"checks; the whole: {found['hours']:.2f} hours of generation, "
        f"{found[f'{kind.lower()}_hours']:.2f} {kind}-hours"
        + (f", cost {found['cost']:.2f}" if found["cost"] else "")
    )
    typer.echo(f"page:    {found['page']}")


def import_(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="images made elsewhere")],
    config: ConfigPath,
    overrides: Overrides = None,
    format: Annotated[
        str, typer.Option(help="imagefolder, parquet, webdataset or huggingface")
    ] = "imagefolder",
) -> None:
    """Make images from elsewhere a run's synthetic images, each once; then `run` goes on with them."""
    import json

    source = json.dumps({"format": format, "path": folder})
    more = [
        "generation.generator=imported",
        f"generation.generator_kwargs={{source: {source}}}",
        "prompting.mix={plain: 1}",
    ]
    settings = load_config(config, [*more, *(overrides or ())])
    _run(settings, "generation", None)
    _say_written(settings, stage_of("generation").shown)
    words = " ".join(shlex.join(["--set", item]) for item in [*more, *(overrides or ())])
    typer.echo(f"train on them: ray-synth run --config {shlex.quote(str(config))} {words}")


def _shorter(stage: str) -> Callable[..., None]:
    def verb(
        config: ConfigPath = QUICKSTART, overrides: Overrides = None, force_stage: Force = None
    ) -> None:
        settings = load_config(config, overrides)
        _run(settings, stage, force_stage)
        _say_written(settings, stage_of(stage).shown)

    return verb


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
        _say_written(settings, stage_of("evaluation").shown)
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
    with stoppable():
        folder = run_studies(name, settings, seeds=chosen)
    if name != "all":
        typer.echo(folder.read_bytes(f"{name}/table.md").decode())
    typer.echo(f"page:    {folder.address('index.html')}")


def _say_written(settings: Config, name: str) -> None:
    from ray_synth.cluster.connection import runs_folder

    typer.echo(f"wrote {runs_folder(settings.runs_dir).child(settings.name).address(name)}")


def report(config: ConfigPath = QUICKSTART, overrides: Overrides = None) -> None:
    """Write the report of a finished run again."""
    settings = load_config(config, overrides)
    _run(settings, REPORT, None)
    _say_written(settings, "report/index.html")


def register(app: typer.Typer) -> None:
    """Add the verbs to the command, in the order of the stages."""
    app.command()(run)
    for name, stage in SHORTER.items():
        said = stage_of(stage).says
        app.command(name, help=f"{said[0].upper()}{said[1:]}, and stop.")(_shorter(stage))
    app.command()(preview)
    app.command("import")(import_)
    for verb in (evaluate, report, study):
        app.command()(verb)
