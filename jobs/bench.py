"""Benchmarks against the bare libraries, in one run: `python jobs/bench.py VERB`.

Each verb prints a table and, as its last line, one JSON object with its figures. Rounds alternate
between the contenders, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all contenders, before torch is loaded

import typer
from bench_device import device_name, dtype_name, wait_for
from bench_scale import plan_rows, plans, scaling
from bench_serving import serving
from bench_store import stores
from bench_storing import storing as stored_per_second

from ray_synth.config import ClusterConfig, GenerationConfig, QualityConfig, load_config

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
ConfigPath = Annotated[Path, typer.Option("--config", "-c")]
Overrides = Annotated[list[str] | None, typer.Option("--set")]
Contender = Callable[[list[dict[str, Any]]], float]  # makes the rows of a plan: images a second


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
        return _storing(storing, cores, rounds)
    import torch

    from ray_synth.cluster.connection import connect
    from ray_synth.device import pick_device, pick_dtype
    from ray_synth.generators.registry import filled

    settings = load_config(config, overrides)
    made = filled(settings.generation).model_copy(update={"checks": QualityConfig(policy="off")})
    device = pick_device(made.device)
    dtype = pick_dtype(made.dtype, device)
    torch.set_num_threads(made.num_threads or os.cpu_count() or 1)
    size = made.batch_size
    assert isinstance(size, int), "give a number: --set generation.batch_size=16"
    stock_dtype = torch.float16 if device.startswith("cuda") else torch.float32
    stock = _stock_pipeline(made, stock_dtype, device)
    contenders: dict[str, Contender] = {"stock": partial(_stock_round, stock, made=made)}
    contenders |= _ours(made, parts=parts)
    with connect(ClusterConfig(num_cpus=settings.cluster.num_cpus)):
        rates = _rates(contenders, rounds=rounds, images=batches * size)
    titles = {
        "stock": f"stock diffusers loop, {dtype_name(stock_dtype)}",
        "ours": "our generator alone, encoding included",
        "ray": "our generator under Ray Data, encoding and storing included",
    }
    print(
        f"{made.model}, {made.width}x{made.height}, {made.num_inference_steps} steps, guidance "
        f"{made.guidance_scale}, batch {size}, ours in {dtype_name(dtype)} on {device}, "
        f"{torch.get_num_threads()} threads; images/s, median of {rounds} rounds (each)"
    )
    figures = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        shown = ", ".join(f"{value:.2f}" for value in values)
        ratio = figures[name] / figures["stock"]
        print(f"{titles.get(name, name):<62} {figures[name]:8.2f} {ratio:6.2f}x   ({shown})")
    flops = _flops(stock, plan_rows(size), made) / size
    limit = _matmul_limit(dtype, device)
    share = {name: rate * flops / limit for name, rate in figures.items()}
    print(
        f"{flops / 1e9:.1f} GFLOP per image; this device multiplies matrices at "
        f"{limit / 1e9:,.0f} GFLOP/s in {dtype_name(dtype)}: stock takes "
        f"{100 * share['stock']:.0f}% of that, ours {100 * share['ours']:.0f}%"
    )
    _json(
        "generation",
        images_per_second={k.strip(" +"): round(v, 3) for k, v in figures.items()},
        ray_over_ours=round(figures["ray"] / figures["ours"], 4),
        ours_over_stock=round(figures["ours"] / figures["stock"], 4),
        ray_over_stock=round(figures["ray"] / figures["stock"], 4),
        share_of_matmul_limit={k.strip(" +"): round(v, 4) for k, v in share.items()},
        dtype=dtype_name(dtype),
        device=device_name(device),
    )


def _storing(size: int, cores: int, rounds: int) -> None:
    """All that an actor does besides generating, in each format; the default one in the last line."""
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for image_format, images in (("webp", 320), ("png", 480), ("auto", 4_800)):
            figures = stored_per_second(image_format, size, cores, images)
            found.setdefault(image_format, []).append(figures)
            print(
                f"{figures['format']:<5} {size} px, {cores} cores: "
                f"{figures['stored_images_per_second']:7.1f} images stored/s of one actor, "
                f"{100 * figures['encode_share']:.0f}% of its time in encoding, "
                f"{figures['kilobytes_per_image']:.0f} kB each",
                flush=True,
            )
    ranked = sorted(found["auto"], key=lambda figures: figures["stored_images_per_second"])
    _json("generation", **ranked[len(ranked) // 2])


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


def _ours(made: GenerationConfig, *, parts: bool) -> dict[str, Contender]:
    """Our generator: alone, with each part of its speed path alone, and under Ray Data."""
    from ray_synth.generators.diffusion import DiffusionGenerator

    alone = {**(_parts(made) if parts else {}), "ours": (made, {})}
    found: dict[str, Contender] = {
        name: partial(_ours_round, DiffusionGenerator(config, **on), made=made)
        for name, (config, on) in alone.items()
    }
    return {**found, "ray": partial(_ray_round, made=made)}


def _rates(contenders: dict[str, Contender], *, rounds: int, images: int) -> dict[str, list[float]]:
    """Images a second of each contender in each round."""
    for name, contender in contenders.items():
        if name != "ray":
            contender(plan_rows(images))  # warm up
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1, rounds + 1):
        # Prompts that no contender has seen: one that keeps them would not encode any.
        plan = plan_rows(images, first=number * images)
        for name, contender in contenders.items():
            rates[name].append(contender(plan))
    return rates


def _parts(made: GenerationConfig) -> dict[str, tuple[GenerationConfig, dict[str, bool]]]:
    """The speed path off, and each part of it on alone: settings, and arguments of the generator."""
    off: dict[str, Any] = {"compile": False, "dtype": "float32"}
    parts: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "all parts off": ({}, ()),
        "  + channels_last": ({}, ("channels_last",)),
        "  + prompts encoded once": ({}, ("cache_prompts",)),
        "  + half precision": ({"dtype": "bfloat16"}, ()),
        "  + torch.compile": ({"compile": True}, ()),
        "  + channels_last, torch.compile": ({"compile": True}, ("channels_last",)),
    }
    return {
        name: (
            made.model_copy(update={**off, **settings}),
            {part: part in on for part in ("channels_last", "cache_prompts")},
        )
        for name, (settings, on) in parts.items()
    }


def _flops(pipeline: Any, plan: list[dict[str, Any]], made: GenerationConfig) -> float:
    """Floating-point operations of one batch, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _stock_round(pipeline, plan, made)
    return counter.get_total_flops()


def _matmul_limit(dtype: Any, device: str) -> float:
    """The FLOP/s of a large matrix product: no dense network is faster."""
    import torch

    size = 8192 if device.startswith("cuda") else 2048
    a = torch.randn(size, size, device=device).to(dtype)

    def once() -> None:
        a @ a
        wait_for(device)

    once()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        once()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def _json(verb: str, **figures: Any) -> None:
    print(json.dumps({"verb": verb, **figures}))


def _stock_pipeline(made: GenerationConfig, dtype: Any, device: str) -> Any:
    """The pipeline as diffusers' documentation loads it."""
    import diffusers

    from ray_synth.generators.loading import resolve_model

    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
        resolve_model(made.model), dtype=dtype, revision=made.revision, variant=made.variant
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _stock_round(pipeline: Any, plan: list[dict[str, Any]], made: GenerationConfig) -> float:
    size = made.batch_size
    assert isinstance(size, int)
    started = time.perf_counter()
    for at in range(0, len(plan), size):
        pipeline(
            [row["prompt"] for row in plan[at : at + size]],
            num_inference_steps=made.num_inference_steps,
            guidance_scale=made.guidance_scale,
            width=made.width,
            height=made.height,
        )
    return len(plan) / (time.perf_counter() - started)


def _ours_round(generator: Any, plan: list[dict[str, Any]], made: GenerationConfig) -> float:
    from ray_synth.data.images import encode_image

    started = time.perf_counter()
    for at in range(0, len(plan), generator.batch_size):
        for image in generator.generate(plan[at : at + generator.batch_size]):
            encode_image(image, **made.encoding)
    return len(plan) / (time.perf_counter() - started)


def _ray_round(plan: list[dict[str, Any]], made: GenerationConfig) -> float:
    """Steady state: from the second batch's arrival at the consumer to the last one's."""
    import pyarrow as pa

    from ray_synth.generation.maker import GenerationJob
    from ray_synth.generation.store import ImageStore
    from ray_synth.generation.stream import image_stream
    from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
    from ray_synth.storage.folder import Folder

    assert isinstance(made.batch_size, int)
    # Two batches more, since the first ones only start the clock.
    extra = [{**row, "sample_id": f"x{row['sample_id']}"} for row in plan[: 2 * made.batch_size]]
    with tempfile.TemporaryDirectory() as folder:
        table = pa.Table.from_pylist(extra + plan, schema=PLAN_SCHEMA)
        job = GenerationJob(made, PlanTable(table), ImageStore(Folder(folder)))
        arrivals, counts = [], []
        for block in image_stream(job).iter_batches(batch_size=None, batch_format="pyarrow"):
            arrivals.append(time.perf_counter())
            counts.append(len(block))
    return sum(counts[2:]) / (arrivals[-1] - arrivals[1])


if __name__ == "__main__":
    app()
