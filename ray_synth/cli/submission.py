"""`ray-synth submit`, `follow`, `stop` and `jobs`: runs on a cluster, from anywhere that reaches it."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ray_synth import __version__
from ray_synth.cli.output import AsJson, say, say_json, show
from ray_synth.cli.running import SHORTER
from ray_synth.config import Config, load_config
from ray_synth.errors import UserError
from ray_synth.stages import REPORT

VERBS = (
    "run", "disambiguate", "plan", "generate", "train", "evaluate", "report", "study", "tune",
    "retrieve", "doctor",
)  # fmt: skip
# Verbs that have a plan, and the stage that each stops after.
PLANNED = {"run": REPORT, "report": REPORT} | {name: stage for name, (stage, _) in SHORTER.items()}
# In the environment of a job that runs what its cluster has installed.
VERSION = "RAY_SYNTH_VERSION"
Address = Annotated[
    str | None,
    typer.Option(
        help="the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS where that is "
        "one, else http://127.0.0.1:8265"
    ),
]
JobId = Annotated[
    str, typer.Argument(help="as `ray-synth submit` said, and `ray-synth jobs` lists")
]
Environment = Annotated[
    list[str] | None,
    typer.Option(help="pass on a variable of this environment, by name: HF_TOKEN"),
]
Include = Annotated[
    list[str] | None, typer.Option(help="upload this file or folder too: a plug-in's module")
]
Code = Annotated[
    bool | None,
    typer.Option(
        "--code/--no-code",
        help="upload ray-synth itself; default: where it runs from a working copy",
    ),
]
Name = Annotated[str | None, typer.Option("--id", help="default: the run's name, numbered")]
Dry = Annotated[
    bool,
    typer.Option("--dry-run", help="print what would be uploaded, run and made; send nothing"),
]


def submit(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=f"one of: {', '.join(VERBS)}")],
    arguments: Annotated[list[str] | None, typer.Argument(help="as the verb takes them")] = None,
    address: Address = None,
    job_id: Name = None,
    follows: Annotated[
        bool, typer.Option("--follow/--no-follow", help="show the job's log until it ends")
    ] = True,
    env: Environment = None,
    include: Include = None,
    code: Code = None,
    dry: Dry = False,
) -> None:
    """Run a verb as a job on a Ray cluster, show its log, and exit with its code.

    The options of `submit` come before the verb. The same command again continues the run.
    """
    from ray_synth.cluster import jobs
    from ray_synth.cluster.upload import config_place, gather, is_checkout

    if job_id and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", job_id):
        raise UserError(f"--id {job_id!r}: letters, digits, dots, dashes and underscores only")
    parameters = _parse(context, verb, arguments or [])
    config_path, overrides, rest = _split(arguments or [], parameters.get("config"))
    config = load_config(config_path, overrides) if config_path else None
    code = is_checkout() if code is None else code
    more = [*_files(parameters), *(include or [])]
    upload = gather(config, config_path, code=code, include=more)
    variables = jobs.passed_on(env or [])
    if not code:
        variables[VERSION] = __version__
    given = ["--config", config_place(config_path)] if config_path else []
    given += [word for override in overrides for word in ("--set", override)]
    line = jobs.entrypoint(verb, [*given, *rest])
    said = [*upload.describe(), *(f"note: {note}" for note in upload.notes)]
    if dry:
        say(*said, f"would run: {line}")
        _say_plan(verb, config, parameters)
        return
    client = jobs.connect_jobs(address)
    say(*said, err=True)
    run = f"{config.runs_dir.rstrip('/')}/{config.name}" if config and verb != "doctor" else None
    with tempfile.TemporaryDirectory() as folder:
        upload.write(Path(folder))
        submitted = jobs.submit(
            client,
            line,
            working_dir=Path(folder) if upload.files else None,
            run=run,
            name=config.name if config else verb,
            job_id=job_id,
            env=variables,
        )
    say(f"submitted job {submitted}", err=True)
    if follows:
        _follow(client, submitted)
    else:
        say(f"`ray-synth follow {submitted}` shows its log", err=True)


def _files(parameters: dict[str, Any]) -> list[str]:
    """Files here, besides the config, that a verb's parameters name."""
    return [
        str(value)
        for key, value in parameters.items()
        if isinstance(value, Path) and key != "config" and not value.is_absolute()
    ]


def _say_plan(verb: str, config: Config | None, parameters: dict[str, Any]) -> None:
    """What a job would make, as far as this machine can tell: its data and its run may lie elsewhere."""
    from ray_synth.pipeline.dry_run import dry_run

    if config is None or verb not in PLANNED:
        return
    until = parameters.get("until") or PLANNED[verb]
    try:
        found = dry_run(config, until=until, force_stage=parameters.get("force_stage"))
    except UserError as error:
        say(f"its plan cannot be made from here, where its data or its run may not be: {error}")
        return
    if "://" not in config.runs_dir:
        say(
            f"as seen from here, where {config.runs_dir} may be another folder than on the cluster:"
        )
    say(*found.lines())


def follow(job_id: JobId, address: Address = None) -> None:
    """Show a job's log until it ends, and exit with its code. Ctrl-C leaves the job running."""
    from ray_synth.cluster.jobs import connect_jobs

    _follow(connect_jobs(address), job_id)


def stop(job_id: JobId, address: Address = None) -> None:
    """Stop a job: it ends cleanly, and all that it made is kept."""
    from ray.job_submission import JobStatus

    from ray_synth.cluster import jobs

    status = jobs.stop(jobs.connect_jobs(address), job_id)
    if status == JobStatus.STOPPED:
        say(f"job {job_id} stopped; to continue, submit the same again")
    else:
        say(f"job {job_id} had ended before: {status.value}")


def list_jobs(address: Address = None, as_json: AsJson = False) -> None:
    """List the cluster's submitted jobs."""
    from ray_synth.cluster.jobs import connect_jobs, job_rows, table

    rows = job_rows(connect_jobs(address).list_jobs())
    if as_json:
        say_json(rows)
    else:
        show(table(rows))


def _follow(client: Any, job_id: str) -> None:
    from ray_synth.cluster import jobs

    try:
        job = jobs.follow(client, job_id)
    except KeyboardInterrupt:
        say(
            f"\nno longer following; job {job_id} goes on. `ray-synth follow {job_id}` shows it "
            f"again, `ray-synth stop {job_id}` ends it",
            err=True,
        )
        raise
    say(jobs.outcome(job), err=True)
    raise typer.Exit(jobs.exit_code(job))


def _parse(context: typer.Context, verb: str, arguments: list[str]) -> dict[str, Any]:
    """The verb's parameters, read as the verb itself would, so that a wrong one is refused here."""
    if verb not in VERBS:
        raise UserError(f"no job can be made of {verb!r}: one of {', '.join(VERBS)}")
    assert context.parent is not None
    command = context.parent.command.commands[verb]  # type: ignore[attr-defined]
    return command.make_context(f"ray-synth {verb}", list(arguments)).params


def _split(arguments: list[str], config: Path | None) -> tuple[Path | None, list[str], list[str]]:
    """A verb's config, its `--set` values, and all its other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", type=Path, default=config)
    parser.add_argument("--set", action="append", default=[])
    known, rest = parser.parse_known_args(arguments)
    return known.config, known.set, rest


def check_version() -> None:
    """Raises UserError in a job that was submitted from another version, and without its code."""
    wanted = os.environ.get(VERSION)
    if wanted and wanted != __version__:
        raise UserError(
            f"the cluster has ray-synth {__version__}, and the job was submitted with {wanted}: install "
            "that there, or submit with --code"
        )


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command(
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
    )(submit)
    app.command()(follow)
    app.command()(stop)
    app.command("jobs")(list_jobs)
