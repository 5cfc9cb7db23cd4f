"""The stages in order: data, meaning, plan, generation and training, evaluation, report.

Each stage reads what the ones before it left in the run directory and leaves its own. The same command
run again skips what is done and continues what is not.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from dataclasses import dataclass, replace
from typing import Any

from ray_synth.budget import check_budget, cluster_capacity
from ray_synth.cluster import connect, runs_folder
from ray_synth.config import Config
from ray_synth.data.dataset import (
    Index,
    drop,
    inspect,
    load_index,
    read_class_names,
    read_index,
    require_every_class,
    select,
)
from ray_synth.generation.generator import check_model, fingerprint, prompt_tokens
from ray_synth.generation.store import ImageStore
from ray_synth.progress import Bar, make_board, watch
from ray_synth.stages import StageLog, stage_inputs
from ray_synth.storage import Folder
from ray_synth.training.trainer import check_recipe

log = logging.getLogger("ray_synth")
VERSIONS = ("ray", "torch", "diffusers", "transformers", "open_clip_torch", "timm", "mlflow")


@dataclass(frozen=True)
class Run:
    """One run: its config, its directory, and its real training images before inspection."""

    config: Config
    runs: Folder
    folder: Folder
    stages: StageLog
    train: Index
    tests: dict[str, Index]

    @property
    def store(self) -> ImageStore:
        return ImageStore(self.folder.child("images"))


def open_run(config: Config, force_stage: str | None = None) -> Run:
    """Check everything that can be checked without a cluster, and open the run directory.

    Raises:
        ValueError: bad data, an unknown model, or a directory that holds other settings' results.
    """
    names = read_class_names(config.data.class_names)
    train = require_every_class(load_index(config.data.train, names), "data.train")
    train = select(train, config.data.train.images_per_class, config.seed)
    sources = {"in_domain": config.data.test, **config.data.ood}
    tests = {
        name: select(load_index(source, train.class_names), source.images_per_class, config.seed)
        for name, source in sources.items()
    }
    runs = runs_folder(config.runs_dir)
    folder = runs.child(config.name)
    stages = StageLog(folder, stage_inputs(config, fingerprint(config.generation)))
    stages.check(force_stage)
    if stages.record("generation") is None:
        check_model(config.generation)
    if stages.record("training") is None:
        check_recipe(config.training)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    folder.write_yaml("config.yaml", {**config.model_dump(mode="json"), "versions": versions})
    return Run(config, runs, folder, stages, train, tests)


def run_pipeline(
    config: Config, *, until: str = "report", force_stage: str | None = None
) -> dict[str, Any]:
    """Run all stages up to `until`; the metrics (empty before evaluation).

    Args:
        until: one of `stages.STAGES`, or `report`.
    """
    started = time.perf_counter()
    run = open_run(config, force_stage)
    if until == "report" and run.folder.exists("metrics.json") and run.stages.record("evaluation"):
        write_report(run, time.perf_counter() - started)
        return run.folder.read_json("metrics.json")
    with connect(config.cluster):
        check_budget(config, cluster_capacity(config))
        tracker = _tracker(run)
        try:
            _run_stages(run, until, tracker)
        except BaseException:
            if tracker:
                tracker.end("FAILED")
            raise
    if until != "report":
        if tracker:
            tracker.end()
        return {}
    metrics = write_report(run, time.perf_counter() - started)
    if tracker:
        _track_results(run, tracker, metrics)
    return metrics


def _run_stages(run: Run, until: str, tracker: Any) -> None:
    from ray_synth.service import Service

    done_at = {"data": 1, "meaning": 2, "plan": 3, "generation": 4, "training": 5}.get(until, 6)
    data = run.stages.run("data", lambda: inspect_data(run))
    run = replace(run, train=drop(run.train, data["corrupt"]))
    if done_at >= 2:
        with Service(run.config) as service:
            run.stages.run("meaning", lambda: resolve_meanings(run, service))
            if done_at >= 3:
                run.stages.run("plan", lambda: write_plan(run, service))
    live = run.config.training.feed != "stored"
    if done_at == 4 or (done_at > 4 and not live):
        run.stages.run("generation", lambda: generate(run))
    if done_at >= 5:
        run.stages.run("training", lambda: train(run, tracker))
        # What a live feed did not wait for is made now: the store ends whole.
        run.stages.run("generation", lambda: generate(run))
    if done_at >= 6:
        run.stages.run("evaluation", lambda: evaluate_models(run))


def inspect_data(run: Run) -> dict[str, Any]:
    """Decode every training image once; the corrupt ones are named and set aside."""
    corrupt = inspect(run.train, max_pixels=run.config.data.max_pixels)
    index = drop(run.train, corrupt)
    for item in corrupt:
        log.warning("set aside %(image_id)s: %(error)s", item)
    require_every_class(index, "data.train, without its corrupt images,")
    return {"num_real": len(index), "counts": index.counts(), "corrupt": corrupt}


def resolve_meanings(run: Run, service: Any) -> dict[str, Any]:
    """One entry of meanings.json a class, kept as each is resolved."""
    config, folder = run.config, run.folder
    entries: dict[str, Any] = {}
    digest = run.stages.digest("meaning")
    if folder.exists("meanings.partial.json"):
        saved = folder.read_json("meanings.partial.json")
        entries = saved["entries"] if saved["digest"] == digest else {}
    if config.meaning.enabled:
        few = select(run.train, config.meaning.num_images, config.seed)
        images: dict[int, list[bytes]] = {}
        for row in read_index(few):
            images.setdefault(row["class_index"], []).append(row["image"])
        todo = {
            name: images[i] for i, name in enumerate(run.train.class_names) if name not in entries
        }
        with Bar("meaning", len(run.train.class_names), "classes", done=len(entries)) as bar:
            for entry in service.resolve_all(todo, seed=config.seed):
                entries[entry["class_name"]] = entry
                folder.write_json("meanings.partial.json", {"digest": digest, "entries": entries})
                bar.advance()
    else:
        entries = {name: {"class_name": name, "choice": name} for name in run.train.class_names}
    folder.write_json("meanings.json", [entries[name] for name in run.train.class_names])
    folder.delete("meanings.partial.json")
    return {name: entry["choice"] for name, entry in entries.items()}


def write_plan(run: Run, service: Any) -> dict[str, Any]:
    """contexts.json (what the LLM wrote, and what the pool had to add) and plan.parquet."""
    from ray_synth.prompting.contexts import Context
    from ray_synth.prompting.plan import ClassPrompts, make_plan
    from ray_synth.prompting.styles import load_styles

    config, folder = run.config, run.folder
    meanings = {entry["class_name"]: entry["choice"] for entry in folder.read_json("meanings.json")}
    contexts: dict[str, Any] = {}
    digest = run.stages.digest("plan")
    if folder.exists("contexts.json"):
        saved = folder.read_json("contexts.json")
        contexts = saved["classes"] if saved["digest"] == digest else {}
    wants = set(config.prompting.mix) - {"plain"}
    if wants:
        todo = {name: meaning for name, meaning in meanings.items() if name not in contexts}
        with Bar("contexts", len(meanings), "classes", done=len(contexts)) as bar:
            for name, entry in service.write_contexts_all(todo, seed=config.seed):
                contexts[name] = entry
                folder.write_json("contexts.json", {"digest": digest, "classes": contexts})
                bar.advance()
    classes = [
        ClassPrompts(
            index,
            name,
            meanings[name],
            [
                (Context(**entry["context"]), entry["source"])
                for entry in contexts.get(name, {}).get("contexts", [])
            ],
        )
        for index, name in enumerate(run.train.class_names)
    ]
    count_tokens, limit = prompt_tokens(config.generation)
    plan = make_plan(
        classes,
        num_images=max(1, round(config.prompting.multiplier * len(run.train))),
        mix={str(kind): share for kind, share in config.prompting.mix.items()},
        styles=load_styles(config.prompting.styles),
        negative_prompt=config.prompting.negative_prompt,
        fingerprint=fingerprint(config.generation),
        seed=config.seed,
        count_tokens=count_tokens,
        max_tokens=config.prompting.max_tokens or limit,
    )
    folder.write_table("plan.parquet", plan)
    sources = plan["context_source"].to_pylist()
    return {
        "num_synthetic": plan.num_rows,
        "context_sources": {name: sources.count(name) for name in sorted(set(sources))},
    }


def generate(run: Run) -> dict[str, Any]:
    """Make what the store lacks of the plan."""
    from ray_synth.generation.stream import make_images

    plan = run.folder.read_table("plan.parquet")
    missing = run.store.missing(plan).num_rows
    board = make_board()
    bars = {"images": Bar("generation", missing, "images")} if missing else {}
    with watch(board, bars):
        made = make_images(plan, run.config.generation, run.store, board=board)
    return {"made_in_this_stage": made, **_store_facts(run, plan)}


def _store_facts(run: Run, plan: Any) -> dict[str, Any]:
    """Counts over the finished store: each plan row exactly once."""
    rows = list(run.store.rows(plan, ["accepted", "reject_reason", "gpu_seconds"]))
    assert len(rows) == plan.num_rows, f"{plan.num_rows} rows planned, {len(rows)} in the store"
    seconds = sum(row["gpu_seconds"] for row in rows)
    reasons = [row["reject_reason"] for row in rows if not row["accepted"]]
    return {
        "num_synthetic": len(rows) - len(reasons),
        "rejected": len(reasons),
        "reject_reasons": {reason: reasons.count(reason) for reason in set(reasons)},
        "images_per_actor_second": len(rows) / seconds,
    }


def train(run: Run, tracker: Any) -> dict[str, Any]:
    """Train the real-only baseline and the mixed model; the latter while images are being made."""
    from ray_synth.training.loop import TrainJob, total_steps
    from ray_synth.training.trainer import run_training

    config, training = run.config, run.config.training
    steps = total_steps(training, len(run.train))
    num_synthetic = run.folder.read_table("plan.parquet", ["sample_id"]).num_rows
    seconds = {}
    for arm in (["real_only"] if training.baseline else []) + ["mixed"]:
        started = time.perf_counter()
        board = make_board()
        bars = {f"steps/{arm}": Bar(f"training {arm}", steps, "steps")}
        if arm == "mixed" and training.feed != "stored":
            bars["images"] = Bar("generation", num_synthetic, "images")
        job = TrainJob(
            arm=arm,
            config=training,
            steps=steps,
            class_names=run.train.class_names,
            seed=config.seed,
            folder=run.folder,
            real=run.train if len(run.train) <= training.cache_images else None,
            max_pixels=config.data.max_pixels,
            num_synthetic=num_synthetic if arm == "mixed" else 0,
            tracking=tracker.handle if tracker else None,
            board=board,
        )
        with watch(board, bars):
            run_training(
                job,
                config.generation,
                real=run.train,
                run_name=f"{arm}-{run.stages.digest('training')}",
                board=board,
            )
        seconds[arm] = time.perf_counter() - started
    return {"seconds": seconds, "steps": steps}


def evaluate_models(run: Run) -> dict[str, Any]:
    """Test all models on all test sets and write metrics.json."""
    from ray_synth.evaluation.predictor import evaluate

    config = run.config
    arms = (["real_only"] if config.training.baseline else []) + ["mixed"]
    board = make_board()
    total = sum(len(index) for index in run.tests.values())
    with watch(board, {"tested": Bar("evaluation", total, "images")}):
        results, corrupt = evaluate(
            run.tests,
            folder=run.folder,
            arms=arms,
            config=config.evaluation,
            class_names=run.train.class_names,
            max_pixels=config.data.max_pixels,
            board=board,
        )
    tree: dict[str, Any] = {}
    for (model, test_set), found in results.items():
        node = tree
        for part in model.split("."):
            node = node.setdefault(part, {})
        if test_set == "in_domain":
            node["in_domain"] = found
        else:
            node.setdefault("ood", {})[test_set] = found
    return {"results": tree, "corrupt": corrupt}


def write_report(run: Run, seconds: float) -> dict[str, Any]:
    """metrics.json and the page, from what the stages left."""
    from ray_synth.report.page import write_report as write_page
    from ray_synth.report.sheet import write_contact_sheet

    started = time.perf_counter()
    records = {stage: run.stages.record(stage) or {} for stage in run.stages.inputs}
    results = {stage: record.get("result", {}) for stage, record in records.items()}
    evaluation, generation = results["evaluation"], results["generation"]
    arms = results["training"].get("seconds", {})
    before = run.folder.read_json("metrics.json") if run.folder.exists("metrics.json") else {}
    metrics = {
        "run": run.config.name,
        "num_real": results["data"]["num_real"],
        "num_synthetic": generation["num_synthetic"],
        **evaluation["results"],
        "images_per_second": {
            "generation": generation["images_per_actor_second"]
            * run.config.generation.pool.max_size
        },
        "stall_fraction": run.folder.read_json("models/mixed.json")["stall_fraction"],
        "seconds": {
            **run.stages.seconds(),
            **{f"training_{arm}": value for arm, value in arms.items()},
        },
        "corrupt": {"train": results["data"]["corrupt"], "test": evaluation["corrupt"]},
        "rejected": generation["rejected"],
        "reject_reasons": generation["reject_reasons"],
        "contexts": results["plan"]["context_sources"],
    }
    metrics["seconds"]["total"] = before.get("seconds", {}).get("total", seconds)
    run.folder.write_json("metrics.json", metrics)
    write_contact_sheet(run.folder)
    write_page(run.folder)
    log.info("report: %.1f s", time.perf_counter() - started)
    return metrics


def _tracker(run: Run) -> Any:
    if not run.config.tracking.enabled:
        return None
    from ray_synth.tracking import Tracker

    return Tracker(run.config, run.runs, run.folder)


def _track_results(run: Run, tracker: Any, metrics: dict[str, Any]) -> None:
    tracker.metrics({key: value for key, value in metrics.items() if key != "corrupt"})
    if run.folder.is_local:
        for name in ("config.yaml", "meanings.json", "metrics.json", "report/index.html"):
            tracker.artifact(run.folder.path(name))
    tracker.end()
