"""Verbs that do the work: run and the verbs that stop earlier, and study."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_synth.cli.output import AsJson, say, say_json, show
from ray_synth.config import Config, load_config
from ray_synth.errors import UserError
from ray_synth.stages import REPORT, STAGES, stage_of, times

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="a YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a setting: a.b=value", metavar="A.B=V")
]
Force = Annotated[
    str | None,
    typer.Option(
        "--force-stage",
        help="do this stage and all later ones again",
        autocompletion=lambda: list(STAGES),
    ),
]
Probe = Annotated[
    bool,
    typer.Option("--estimate", help="probe first: seconds, device hours and cost of each stage"),
]
Until = Annotated[
    str,
    typer.Option(
        help=f"stop after a stage: {', '.join(STAGES)}",
        metavar="STAGE",
        autocompletion=lambda: [*STAGES, REPORT],
    ),
]
Dry = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="print what is done, what would be made and its cost; start nothing"
    ),
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="DIR",
        help="classes came or went: keep what an earlier run has of the others (take_over.run)",
    ),
]
QUICKSTART = Path("jobs/configs/quickstart.yaml")
# Verbs that stop early: after which stage, and its function in ray_synth/pipeline/api.py.
SHORTER = {
    "disambiguate": ("meaning", "resolve_meanings"),
    "plan": ("plan", "plan"),
    "generate": ("generation", "generate"),
    "train": ("training", "train"),
    "evaluate": ("evaluation", "evaluate"),
}


@contextmanager
def stoppable() -> Iterator[None]:
    """A block that Ctrl-C and SIGTERM may end; typer would end in silence."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; what was made is kept, and the same command continues", err=True)
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
    dry: Dry = False,
    as_json: AsJson = False,
    earlier: From = None,
) -> None:
    """Run all stages, then print what was gained."""
    taken = [f"take_over.run={earlier}"] if earlier else []
    settings = load_config(config, [*taken, *(overrides or ())])
    if dry:
        _print_dry(settings, until, force_stage, as_json)
        return
    left = _run(settings, until, force_stage, estimate=estimate)
    if until == REPORT and not as_json:
        _print_results(settings, left)
    else:
        _print_left(settings, until, left, as_json)


def _print_dry(settings: Config, until: str, force_stage: str | None, as_json: bool) -> None:
    from ray_synth.pipeline.dry_run import dry_run

    found = dry_run(settings, until=until, force_stage=force_stage)
    if as_json:
        say_json(found.as_dict())
    else:
        say(*found.lines())


def _print_left(settings: Config, stage: str, left: dict[str, Any], as_json: bool) -> None:
    """What a stage left: its figures as JSON, or where it lies."""
    if as_json:
        say_json(left)
    else:
        _say_written(settings, "report/index.html" if stage == REPORT else stage_of(stage).shown)


def _print_results(settings: Config, metrics: dict[str, Any]) -> None:
    from ray_synth.cluster.connection import runs_folder
    from ray_synth.report.table import comparison_table

    show(comparison_table(metrics))
    show(_stage_table(metrics))
    runs = runs_folder(settings.runs_dir)
    folder = runs.child(settings.name)
    say(
        f"{metrics['num_real']} real and {metrics['num_synthetic']} synthetic images; generation "
        f"{metrics['images_per_second']['generation']:.1f} images/s; training waited for data "
        f"{100 * metrics['stall_fraction']:.1f}% of its time",
        f"report:  {folder.address('report/index.html')}",
        f"metrics: {folder.address('metrics.json')}",
    )
    if settings.tracking.enabled:
        from ray_synth.monitoring.mlflow_run import tracking_uri

        uri = tracking_uri(settings, runs)
        command = shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
        say(f"MLflow:  {command}")


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
    as_json: AsJson = False,
) -> None:
    """Draw the first images of a run, and say what the whole would take, on one page."""
    from ray_synth.pipeline.preview import preview as look

    settings = load_config(config, overrides)
    with stoppable():
        found = look(settings, images=images, force_stage=force_stage)
    if as_json:
        say_json(found)
        return
    kind = "GPU" if found["gpu_hours"] else "CPU"
    say(
        f"{found['images']} of {found['planned']:,} planned images, {found['passed']} passed the "
        f"checks; the whole: {found['hours']:.2f} hours of generation, "
        f"{found[f'{kind.lower()}_hours']:.2f} {kind}-hours"
        + (f", cost {found['cost']:.2f}" if found["cost"] else ""),
        f"page:    {found['page']}",
    )


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
    say(f"train on them: ray-synth run --config {shlex.quote(str(config))} {words}")


def _shorter(name: str) -> Callable[..., None]:
    def verb(
        config: ConfigPath = QUICKSTART,
        overrides: Overrides = None,
        force_stage: Force = None,
        as_json: AsJson = False,
    ) -> None:
        _work(name, load_config(config, overrides), force_stage, as_json)

    return verb


def _work(name: str, settings: Config, force_stage: str | None, as_json: bool) -> None:
    """Do a verb that stops early, and print what its stage left."""
    from ray_synth.pipeline import api

    stage, function = SHORTER[name]
    with stoppable():
        left = getattr(api, function)(settings, force_stage=force_stage)
    _print_left(settings, stage, left, as_json)


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
    as_json: AsJson = False,
) -> None:
    """Test the trained models, or any timm checkpoint, and stop."""
    settings = load_config(config, overrides)
    if model is None:
        if checkpoint or pretrained or name:
            raise UserError("--checkpoint, --pretrained and --name go with --model")
        _work("evaluate", settings, force_stage, as_json)
        return
    from ray_synth.cluster.connection import runs_folder
    from ray_synth.evaluation.checkpoint import evaluate_checkpoint
    from ray_synth.report.table import result_table

    folder = runs_folder(settings.runs_dir).child(settings.name).child("evaluations")
    results = evaluate_checkpoint(
        settings, folder, model=model, checkpoint=checkpoint, pretrained=pretrained, name=name
    )
    if as_json:
        say_json({"model": model, "results": results})
    else:
        show(result_table(model, results))


def study(
    name: Annotated[str, typer.Argument(help="ablation, scaling, ...; or all")],
    config: ConfigPath = QUICKSTART,
    overrides: Overrides = None,
    seeds: Annotated[
        str | None, typer.Option(help="comma-separated, instead of the config's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question by a grid of runs: a table, a plot and a page."""
    from ray_synth.studies.catalog import known_name
    from ray_synth.studies.study import run_studies

    settings, name = load_config(config, overrides), known_name(name)
    try:
        chosen = [int(part) for part in seeds.split(",")] if seeds else None
    except ValueError:
        raise UserError(f"--seeds {seeds!r}: give whole numbers, such as 0,1,2") from None
    with stoppable():
        folder = run_studies(name, settings, seeds=chosen)
    if as_json:
        from ray_synth.report.status import folders

        names = [each for each in folders(folder) if folder.child(each).exists("study.json")]
        say_json({each: folder.read_json(f"{each}/study.json") for each in names})
        return
    if name != "all":
        typer.echo(folder.read_bytes(f"{name}/table.md").decode())
    say(f"page:    {folder.address('index.html')}")


def _say_written(settings: Config, name: str) -> None:
    from ray_synth.cluster.connection import runs_folder

    say(f"wrote {runs_folder(settings.runs_dir).child(settings.name).address(name)}")


def report(
    config: ConfigPath = QUICKSTART, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Write the report of a finished run again."""
    settings = load_config(config, overrides)
    _print_left(settings, REPORT, _run(settings, REPORT, None), as_json)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command, in the order of the stages."""
    app.command()(run)
    for name, (stage, _) in SHORTER.items():
        if name != "evaluate":  # which takes other models as well
            said = stage_of(stage).says
            app.command(name, help=f"{said[0].upper()}{said[1:]}, and stop.")(_shorter(name))
    app.command()(preview)
    app.command("import")(import_)
    for verb in (evaluate, report, study):
        app.command()(verb)
