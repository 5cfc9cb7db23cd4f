"""`ray-synth serve`: checks a Serve config, hands it over to Ray's own `serve`, asks the service."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ray_synth.cluster.jobs import require_answer
from ray_synth.errors import UserError

app = typer.Typer(help="Check, run, deploy and ask the disambiguation service.")
ConfigFile = Annotated[Path, typer.Argument(help="a Serve config: serve/config.yaml")]


@app.command()
def check(config: ConfigFile) -> None:
    """Find misspelt keys and wrong values, which Ray would take in silence, and stop."""
    from ray_synth.service.deploy_config import load_serve_config

    applications = load_serve_config(config)["applications"]
    names = ", ".join(str(entry.get("name", "default")) for entry in applications)
    typer.echo(f"{config}: nothing is wrong with it (applications: {names or 'none'})")


@app.command()
def run(config: ConfigFile) -> None:
    """Check, then serve in the foreground: on the cluster at RAY_ADDRESS, else on a Ray of its own."""
    _check(config)
    _hand_over("run", str(config))


@app.command()
def deploy(
    config: ConfigFile,
    address: Annotated[
        str, typer.Option(envvar="RAY_DASHBOARD_ADDRESS", help="the cluster's dashboard")
    ] = "http://localhost:8265",
) -> None:
    """Check, then send the config to a running cluster, and return."""
    _check(config)
    require_answer(address.rstrip("/"))
    _hand_over("deploy", str(config), "--address", address)


@app.command()
def images(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="a run's config; default: embedded models")
    ] = None,
    port: int = 8001,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. generation.num_gpus=1")
    ] = None,
) -> None:
    """Serve the generator of a config by OpenAI's images API, on the loopback address."""
    import json
    import tempfile

    from ray_synth.config import GenerationConfig, load_config

    if config is None and overrides:
        raise UserError("--set changes a config: give one with --config")
    generation = load_config(config, overrides).generation if config else GenerationConfig()
    values = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "images",
                "route_prefix": "/",
                "import_path": "ray_synth.service.images_app:build",
                "args": {"generation": generation.model_dump(mode="json")},
            }
        ],
    }
    folder = Path(tempfile.mkdtemp(prefix="ray-synth-images-"))
    path = folder / "images.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    _check(path)
    _hand_over("run", str(path))


@app.command()
def ask(
    class_name: Annotated[str, typer.Argument(help="as in the class list: crane")],
    images: Annotated[
        list[str] | None, typer.Argument(help="image files, or https URLs that the service allows")
    ] = None,
    url: Annotated[str, typer.Option(help="where the service is")] = "http://localhost:8000",
    context: Annotated[str | None, typer.Option(help="from a list of birds")] = None,
    meanings: Annotated[
        list[str] | None, typer.Option("--meaning", help="a candidate to add; repeatable")
    ] = None,
    num_meanings: Annotated[int, typer.Option(help="asked from the language model")] = 5,
    seed: int = 0,
) -> None:
    """Ask a running service what a class name means, and print its answer as JSON.

    Its token, where it has one, is read from RAY_SYNTH_SERVE_TOKEN.
    """
    from ray_synth.service.client import Client, ServiceError

    try:
        with Client(url) as client:
            answer = client.disambiguate(
                class_name, images or [], context=context, meanings=meanings,
                num_meanings=num_meanings, seed=seed,
            )  # fmt: skip
    except (ServiceError, OSError) as error:  # OSError: no such image, and no such service
        raise UserError(str(error)) from None
    typer.echo(answer.model_dump_json(indent=2))


def _check(config: Path) -> None:
    from ray_synth.service.deploy_config import load_serve_config
    from ray_synth.service.gate import service_token

    load_serve_config(config)
    service_token()


def _hand_over(*arguments: str) -> NoReturn:
    """Become Serve's own command, of this environment: its signals and exit code are the caller's."""
    from ray_synth.cluster.connection import ENVIRONMENT
    from ray_synth.service.request_ids import PROXY_CALLBACK

    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "ray.serve.scripts", *arguments]
    os.execve(sys.executable, command, {**ENVIRONMENT, **PROXY_CALLBACK, **os.environ})
