"""Generation against a stock diffusers loop, alone and under Ray Data, and what an actor stores."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bench_device import device_name, dtype_name, wait_for
from bench_scale import plan_rows
from bench_storing import storing as stored_per_second

from ray_synth.config import ClusterConfig, Config, GenerationConfig, QualityConfig

Contender = Callable[[list[dict[str, Any]]], float]  # makes the rows of a plan: images a second


def generation(settings: Config, *, batches: int, rounds: int, parts: bool) -> dict[str, Any]:
    """Images a second of each contender, all in turn; a table is printed.

    Args:
        batches: of a round.
        parts: also each part of the speed path alone.
    """
    import torch

    from ray_synth.cluster.connection import connect
    from ray_synth.device import pick_device, pick_dtype
    from ray_synth.generators.registry import filled

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
    return {
        "images_per_second": {k.strip(" +"): round(v, 3) for k, v in figures.items()},
        "ray_over_ours": round(figures["ray"] / figures["ours"], 4),
        "ours_over_stock": round(figures["ours"] / figures["stock"], 4),
        "ray_over_stock": round(figures["ray"] / figures["stock"], 4),
        "share_of_matmul_limit": {k.strip(" +"): round(v, 4) for k, v in share.items()},
        "dtype": dtype_name(dtype),
        "device": device_name(device),
    }


def storing(size: int, cores: int, rounds: int) -> dict[str, Any]:
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
    return ranked[len(ranked) // 2]


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
