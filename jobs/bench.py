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
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all contenders, before torch is loaded

import typer

from ray_synth.config import ClusterConfig, GenerationConfig, load_config

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


@app.callback()
def _verbs() -> None:
    """Benchmarks against the bare libraries."""


@app.command()
def generation(
    config: Annotated[Path, typer.Option("--config", "-c")] = QUICKSTART,
    overrides: Annotated[list[str] | None, typer.Option("--set")] = None,
    batches: Annotated[int, typer.Option(help="batches a round")] = 6,
    rounds: Annotated[int, typer.Option(help="rounds of all contenders")] = 3,
) -> None:
    """Stock diffusers loop; our generator alone; our generator under Ray Data."""
    import torch

    from ray_synth.cluster import connect
    from ray_synth.device import pick_device, pick_dtype
    from ray_synth.generation.generator import Generator

    settings = load_config(config, overrides)
    made = settings.generation
    device = pick_device(made.device)
    dtype = pick_dtype(made.dtype, device)
    torch.set_num_threads(made.num_threads or os.cpu_count() or 1)
    plan = _plan(batches * made.batch_size)
    stock = _stock_pipeline(made, dtype, device)
    ours = Generator(made)
    rates: dict[str, list[float]] = {"stock": [], "ours": [], "ray": []}
    with connect(ClusterConfig(num_cpus=settings.cluster.num_cpus)):
        _stock_round(stock, plan[: made.batch_size], made)
        ours.generate(plan[: made.batch_size])
        for _ in range(rounds):
            rates["stock"].append(_stock_round(stock, plan, made))
            rates["ours"].append(_ours_round(ours, plan, made))
            rates["ray"].append(_ray_round(plan, made))
    figures: dict[str, Any] = {name: statistics.median(values) for name, values in rates.items()}
    table = [
        ("stock diffusers loop", rates["stock"]),
        ("our generator, encoding included", rates["ours"]),
        ("our generator under Ray Data, encoding and storing included", rates["ray"]),
    ]
    print(
        f"{made.model}, {made.width}x{made.height}, {made.num_inference_steps} steps, batch "
        f"{made.batch_size}, {str(dtype).removeprefix('torch.')} on {device}, "
        f"{torch.get_num_threads()} threads; images/s, median of {rounds} rounds (each round)"
    )
    for name, values in table:
        shown = ", ".join(f"{value:.2f}" for value in values)
        print(f"{name:<62} {statistics.median(values):8.2f}   ({shown})")
    print(
        json.dumps(
            {
                "verb": "generation",
                "images_per_second": {k: round(v, 3) for k, v in figures.items()},
                "ray_over_ours": round(figures["ray"] / figures["ours"], 4),
                "ours_over_stock": round(figures["ours"] / figures["stock"], 4),
                "ray_over_stock": round(figures["ray"] / figures["stock"], 4),
            }
        )
    )


def _plan(count: int) -> list[dict[str, Any]]:
    subjects = ("a tree", "a house", "the number seven", "a boat", "a dog")
    return [
        {
            "sample_id": f"{i:08d}",
            "class_index": i % len(subjects),
            "class_name": subjects[i % len(subjects)],
            "meaning": "",
            "kind": "plain",
            "style": "",
            "prompt": f"a photo of {subjects[i % len(subjects)]}, in bright light, view {i}",
            "negative_prompt": "",
            "context_source": "none",
            "seed": i,
            "reference": "",
        }
        for i in range(count)
    ]


def _stock_pipeline(made: GenerationConfig, dtype: Any, device: str) -> Any:
    """The pipeline as diffusers' documentation loads it."""
    import diffusers

    from ray_synth.generation.generator import resolve_model

    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(
        resolve_model(made.model), dtype=dtype, revision=made.revision, variant=made.variant
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _stock_round(pipeline: Any, plan: list[dict[str, Any]], made: GenerationConfig) -> float:
    started = time.perf_counter()
    for at in range(0, len(plan), made.batch_size):
        pipeline(
            [row["prompt"] for row in plan[at : at + made.batch_size]],
            num_inference_steps=made.num_inference_steps,
            guidance_scale=made.guidance_scale,
            width=made.width,
            height=made.height,
        )
    return len(plan) / (time.perf_counter() - started)


def _ours_round(generator: Any, plan: list[dict[str, Any]], made: GenerationConfig) -> float:
    started = time.perf_counter()
    for at in range(0, len(plan), made.batch_size):
        generator.generate(plan[at : at + made.batch_size])
    return len(plan) / (time.perf_counter() - started)


def _ray_round(plan: list[dict[str, Any]], made: GenerationConfig) -> float:
    """Steady state: from the first batch's arrival at the consumer to the last one's."""
    import pyarrow as pa

    from ray_synth.generation.store import PLAN_SCHEMA, ImageStore
    from ray_synth.generation.stream import image_stream
    from ray_synth.storage import Folder

    # One batch more, since the first only starts the clock.
    rows = plan + [{**row, "sample_id": f"x{row['sample_id']}"} for row in plan[: made.batch_size]]
    with tempfile.TemporaryDirectory() as folder:
        table = pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)
        stream = image_stream(table, made, ImageStore(Folder(folder)))
        arrivals, counts = [], []
        for block in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            arrivals.append(time.perf_counter())
            counts.append(len(block))
    return sum(counts[1:]) / (arrivals[-1] - arrivals[0])


if __name__ == "__main__":
    app()
