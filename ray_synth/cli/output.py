"""What verbs print: lines for people, which fit the terminal, or one JSON document for programs."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from ray_synth.monitoring import logs
from ray_synth.monitoring.terminal import fitted, no_color

AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON document, for programs, and no lines")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="no progress: warnings, errors and the result alone")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="say as well what else only goes to the run's log")
]
PIPE_COLUMNS = 110  # of tables that no terminal shows


def say(*lines: str, err: bool = False, fg: str | None = None) -> None:
    """Print lines, whole in a pipe or a file; NO_COLOR leaves colours out."""
    text = fitted("\n".join(lines), sys.stderr if err else sys.stdout)
    typer.secho(text, fg=fg, err=err, color=False if no_color() else None)


def say_json(value: Any) -> None:
    """Print a value as one line of JSON; numbers of NumPy are numbers, paths are text."""
    plain = json.dumps(
        value, ensure_ascii=False, default=lambda v: v.item() if hasattr(v, "item") else str(v)
    )
    typer.echo(plain)


def show(table: Any) -> None:
    """Print a table of rich's, as wide as the terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)


def voiced(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb that takes `--quiet` and `--verbose` as well."""
    signature = inspect.signature(verb, eval_str=True)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("quiet", Quiet), ("verbose", Verbose))
    ]

    @functools.wraps(verb)
    def spoken(*arguments: Any, quiet: bool, verbose: bool, **named: Any) -> Any:
        logs.set_volume(quiet=quiet, verbose=verbose)
        return verb(*arguments, **named)

    parameters = [*signature.parameters.values(), *extra]
    spoken.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    spoken.__annotations__ = {p.name: p.annotation for p in parameters}
    return spoken


def all_voiced(app: typer.Typer, *others: typer.Typer) -> None:
    """Every verb of these, as `voiced`."""
    commands: Iterable[Any] = (c for group in (app, *others) for c in group.registered_commands)
    for command in commands:
        command.callback = voiced(command.callback)
