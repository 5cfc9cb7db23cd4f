"""The command `ray-synth`: its verbs are in the modules beside; here is how it starts and ends."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated

import typer

from ray_synth.cli import looking, rivals, running, serving, sharing, submission
from ray_synth.cli.exit_codes import BUG, USER_ERROR
from ray_synth.cli.explanation import bug_report, explain
from ray_synth.cli.output import all_voiced, say
from ray_synth.cluster import signals
from ray_synth.monitoring import logs
from ray_synth.storage.secrets import redact

app = typer.Typer(
    name="ray-synth",
    help="Better image classifiers from synthetic images, at cluster scale.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(serving.app, name="serve", no_args_is_help=True)


@app.callback()
def common(
    log_format: Annotated[
        str | None, typer.Option(help="text, or json: an object per line", envvar=logs.VARIABLE)
    ] = None,
) -> None:
    """Better image classifiers from synthetic images, at cluster scale."""
    logs.set_up(log_format)


for group in (running, rivals, looking, sharing, submission):
    group.register(app)
all_voiced(app, serving.app)


def prepare_process() -> None:
    """Logging, and what must be in the environment before torch is loaded (see cluster.py)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logs.set_up()
    signals.stop_on_sigterm()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command and of `jobs/run.py`; ends with one of `exit_codes.EXIT_CODES`."""
    try:
        prepare_process()
        submission.check_version()
        app(arguments, standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(signals.exit_code())
    except SystemExit as end:
        if end.code == signals.INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            sys.exit(signals.exit_code())
        raise
    except Exception as error:
        message = explain(error)
        if message is not None and os.environ.get("RAY_SYNTH_DEBUG"):
            raise
        log, bug = logging.getLogger("ray_synth"), bug_report()
        if logs.is_json():
            log.error(message or bug, exc_info=None if message else error)
        elif message:
            say(f"error: {redact(message)}", fg="red", err=True)
        else:
            typer.echo(redact("".join(traceback.format_exception(error))), err=True, nl=False)
            say(redact(bug), fg="red", err=True)
        sys.exit(USER_ERROR if message else BUG)
