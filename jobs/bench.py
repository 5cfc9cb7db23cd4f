"""Benchmarks against the bare libraries, in one run: `python jobs/bench.py VERB`.

Each verb prints a table and, as its last line, one JSON object with its figures. Rounds alternate
between the contenders, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all contenders, before torch is loaded

import typer
from bench_generation import generation as compared
from bench_generation import storing as stored
from bench_scale import plans, scaling
from bench_serving import serving
from bench_store import stores

from ray_synth.config import load_config

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
ConfigPath = Annotated[Path, typer.Option("--config", "-c")]
Overrides = Annotated[list[str] | None, typer.Option("--set")]


@app.callback()
def _verbs() -> None:
    """Benchmarks against the bare libraries."""


@app.command()
def generation(
    config: ConfigPath = QUICKSTART,
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option(help="batches per round")] = 6,
    rounds: Annotated[int, typer.Option(help="rounds of all contenders")] = 3,
    parts: Annotated[bool, typer.Option(help="also each part of the speed path alone")] = False,
    storing: Annotated[
        int, typer.Option(help="no model: encode and store ready images of this side")
    ] = 0,
    cores: Annotated[int, typer.Option(help="of the actor, with --storing")] = os.cpu_count() or 1,
) -> None:
    """Stock diffusers loop; our generator alone; our generator under Ray Data."""
    if storing:
        return _json("generation", **stored(storing, cores, rounds))
    settings = load_config(config, overrides)
    _json("generation", **compared(settings, batches=batches, rounds=rounds, parts=parts))


@app.command("serving")
def serving_verb(
    concurrency: Annotated[str, typer.Option(help="questions in flight")] = "1,8,32,128",
    rounds: Annotated[int, typer.Option(help="at saturation, against in process")] = 3,
    questions: Annotated[int, typer.Option(help="in a round")] = 128,
) -> None:
    """The service over HTTP at several concurrencies, against the same models in process."""
    levels = [int(part) for part in concurrency.split(",")]
    ranked = serving(levels, rounds=rounds, questions=4 * questions, llm=False)
    resolved = serving(levels, rounds=rounds, questions=questions, llm=True)
    _json("serving", **resolved, ranking_alone=ranked)


@app.command("scaling")
def scaling_verb(
    actors: Annotated[str, typer.Option(help="pool sizes")] = "1,2,4,8,16,32,64",
    seconds: Annotated[float, typer.Option(help="that each batch takes")] = 4.0,
    batches: Annotated[int, typer.Option(help="batches per actor, in the steady state")] = 5,
) -> None:
    """Throughput of 1 to 64 actors that sleep a fixed time, against the ideal."""
    _json("scaling", **scaling([int(part) for part in actors.split(",")], seconds, batches))


@app.command("plans")
def plans_verb(
    rows: Annotated[str, typer.Option(help="plan sizes")] = "10000,1000000,10000000",
    batch_size: Annotated[int, typer.Option(help="rows per chunk")] = 32,
) -> None:
    """Start-up time, driver memory and listing time for long plans, half of which are made."""
    _json("plans", **plans([int(part) for part in rows.split(",")], batch_size))


@app.command("store")
def store_verb(
    rows: Annotated[str, typer.Option(help="rows of the stores")] = "100000,1000000,7700000",
) -> None:
    """Listing, looking up and an epoch of reading, of finished stores of many tiny images."""
    _json("store", **stores([int(part) for part in rows.split(",")]))


@app.command("training")
def training_verb(
    model: Annotated[str, typer.Option(help="a timm model with BatchNorm")] = "resnet18",
    batch_size: Annotated[int, typer.Option(help="real + synthetic")] = 64,
    image_size: int = 64,
    rounds: Annotated[int, typer.Option(help="rounds of all contenders")] = 15,
    steps: Annotated[int, typer.Option(help="steps per round")] = 3,
    compiled: Annotated[bool, typer.Option(help="also under torch.compile")] = True,
    slower: Annotated[float, typer.Option(help="generator, against training; 0: no feeds")] = 100,
) -> None:
    """Plain BN, timm's SplitBN, two forwards, ours; then a live feed against images in memory."""
    from bench_feed import live
    from bench_training import norms

    shape = (model, batch_size, image_size)
    figures = norms(*shape, rounds=rounds, steps=steps, compiled=False)
    if compiled:
        figures["compiled"] = norms(*shape, rounds=rounds, steps=steps, compiled=True)
    if slower:
        figures |= live(slower=slower)
    _json("training", **figures)


@app.command("feed")
def feed_verb(
    images: Annotated[int, typer.Option(help="JPEGs of 100 kB that are made for it")] = 1024,
    policy: Annotated[str, typer.Option(help="of augmentation; see docs/training.md")] = "imagenet",
    batch_size: Annotated[int, typer.Option(help="images per batch")] = 128,
    batches: Annotated[int, typer.Option(help="batches per round")] = 12,
    rounds: Annotated[int, typer.Option(help="rounds of all contenders")] = 3,
    workers: Annotated[str, typer.Option(help="processes; default: 1 to all cores")] = "",
) -> None:
    """JPEGs to batches of 224 px: our feed, torch's DataLoader over timm's dataset, webdataset."""
    from bench_decoding import feeds

    cores = os.cpu_count() or 1
    doubled = sorted({*(2**n for n in range(cores.bit_length()) if 2**n <= cores), cores})
    numbers = [int(part) for part in workers.split(",")] if workers else doubled
    shape = {"images": images, "policy": policy, "batch_size": batch_size, "batches": batches}
    _json("feed", **feeds(**shape, rounds=rounds, workers=numbers))


@app.command("practice")
def practice_verb(
    config: ConfigPath = QUICKSTART,
    overrides: Overrides = None,
    feeds: Annotated[str, typer.Option(help="of training")] = "stored,lockstep",
    rounds: Annotated[int, typer.Option(help="that the plan is cut into")] = 4,
    repeats: Annotated[int, typer.Option(help="runs of each, in turn")] = 3,
) -> None:
    """A plan in rounds against the same images and steps at once: seconds that each round costs."""
    from bench_practice import rounds_cost

    # Words are the same for both, and a baseline is no part of the loop.
    words = ["meaning.enabled=false", "prompting.mix={plain: 1}"]
    settings = load_config(
        config, [*words, "training.baseline=none", "data.validation=20", *(overrides or [])]
    )
    _json("practice", **rounds_cost(settings, feeds.split(","), rounds=rounds, repeats=repeats))


def _json(verb: str, **figures: Any) -> None:
    print(json.dumps({"verb": verb, **figures}))


if __name__ == "__main__":
    app()
