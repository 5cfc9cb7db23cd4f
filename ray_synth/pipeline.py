"""The stages in order: data, meaning, plan, generation and training, evaluation, report.

Each stage reads what the ones before it left in the run directory and leaves its own. The same command
run again skips what is done and continues what is not.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.budget import Reach, preflight
from ray_synth.budget.demands import Sizes
from ray_synth.cluster import connect, runs_folder
from ray_synth.config import ClipConfig, Config, QualityConfig
from ray_synth.data.dataset import (
    Index,
    drop,
    hold_out,
    inspect,
    load_index,
    read_class_names,
    read_index,
    require_every_class,
    select,
)
from ray_synth.generation.chunks import PlanFile, missing_rows
from ray_synth.generation.generator import check_generator, fingerprint, prompt_tokens
from ray_synth.generation.maker import GenerationJob, write_references
from ray_synth.generation.store import PLAN_SCHEMA, ImageStore
from ray_synth.heartbeat import watched
from ray_synth.logs import hide_value_of
from ray_synth.progress import Bar, make_board, watch
from ray_synth.stages import STAGES, StageLog, stage_inputs
from ray_synth.storage import Folder
from ray_synth.training.trainer import check_recipe

log = logging.getLogger("ray_synth")
VERSIONS = ("ray", "torch", "diffusers", "transformers", "open_clip_torch", "timm", "mlflow")


@dataclass(frozen=True)
class Run:
    """One run: its config, its directory, and its real images; none of them is opened yet.

    Attributes:
        train: training images, before inspection.
        tests: the test sets.
        validation: held out of training.
    """

    config: Config
    runs: Folder
    folder: Folder
    stages: StageLog
    train: Index
    tests: dict[str, Index]
    validation: Index

    @property
    def store(self) -> ImageStore:
        return ImageStore(self.folder.child("images"))

    @property
    def sizes(self) -> Sizes:
        """How much there is to do."""
        tests = {name: len(index) for name, index in self.tests.items()}
        return Sizes(len(self.train), len(self.train.class_names), tests)

    def todo(self, until: str) -> list[str]:
        """The stages up to one, or to `report`, that are not done."""
        last = STAGES.index(until) if until in STAGES else len(STAGES)
        return [stage for stage in STAGES[: last + 1] if self.stages.record(stage) is None]

    def generation_job(self, board: Any = None) -> GenerationJob:
        return GenerationJob(
            self.config.generation,
            PlanFile(self.folder),
            self.store,
            run=self.folder,
            clip=self.config.meaning.clip,
            board=board,
        )


def open_run(config: Config, force_stage: str | None = None) -> Run:
    """Check everything that can be checked without a cluster, and begin the run directory.

    Raises:
        ValueError: bad data, an unknown model, or a directory that holds other settings' results.
    """
    run = check_run(config, force_stage)
    begin(run, force_stage)
    return run


def check_run(config: Config, force_stage: str | None = None) -> Run:
    """The run of a config, with all that can be known to be wrong looked for; nothing is written.

    Raises:
        ValueError: as `open_run` does.
    """
    names = read_class_names(config.data.class_names)
    train = require_every_class(load_index(config.data.train, names), "data.train")
    train, validation = hold_out(train, config.data.validation)
    train = select(train, config.data.train.images_per_class, config.seed)
    sources = {"in_domain": config.data.test, **config.data.ood}
    tests = {
        name: select(load_index(source, train.class_names), source.images_per_class, config.seed)
        for name, source in sources.items()
    }
    runs = runs_folder(config.runs_dir)
    folder = runs.child(config.name)
    folder.check_readable()
    stages = StageLog(folder, stage_inputs(config, fingerprint(config.generation)))
    stages.check(force_stage)
    if stages.record("generation") is None:
        check_generator(config.generation)
    if stages.record("plan") is None:
        prompt_limit(config, *prompt_tokens(config.generation))
    if stages.record("training") is None:
        check_recipe(config.training)
    return Run(config, runs, folder, stages, train, tests, validation)


def begin(run: Run, force_stage: str | None = None) -> None:
    """Keep the config in the run directory, and forget what is to be done again.

    Raises:
        ValueError: nothing can be written there.
    """
    run.stages.forget()
    if force_stage in ("quality", "generation"):
        run.store.clear()
    if run.stages.record("generation") is None:
        run.folder.check_writable()
    for name in ("images", "images/rejected", "models", "quality", "report", "stages"):
        run.folder.child(name).sweep()
    run.folder.sweep()
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    values = run.config.model_dump(mode="json")
    run.folder.write_yaml("config.yaml", {**values, "versions": versions})


def run_pipeline(
    config: Config,
    *,
    until: str = "report",
    force_stage: str | None = None,
    estimate: bool = False,
) -> dict[str, Any]:
    """Run all stages up to `until`; the metrics (empty before evaluation).

    Args:
        until: one of `stages.STAGES`, or `report`.
        estimate: first probe the cluster, and in the end say how far off the estimate was.
    """
    started = time.perf_counter()
    hide_value_of(config.meaning.llm.api_key_env)
    run = check_run(config, force_stage)
    if until == "report" and run.folder.exists("metrics.json") and run.stages.record("evaluation"):
        begin(run)
        write_report(run, time.perf_counter() - started)
        return run.folder.read_json("metrics.json")
    with ExitStack() as watching:
        with connect(config.cluster):
            reach = preflight(config, run.sizes, run.todo(until))
            begin(run, force_stage)
            watching.enter_context(watched(run.folder, until))
            tracker = _tracker(run)
            try:
                expected = _forecast(run, until, reach) if estimate else None
                estimated = time.perf_counter()
                _run_stages(run, until, tracker)
            except BaseException as error:
                if tracker:
                    tracker.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
        metrics = write_report(run, time.perf_counter() - started) if until == "report" else {}
        if expected:
            _compare(run, expected, time.perf_counter() - estimated)
        if tracker and metrics:
            _track_results(run, tracker, metrics)
        elif tracker:
            tracker.end()
        return metrics


def _forecast(run: Run, until: str, reach: Reach) -> dict[str, Any]:
    """estimate.json, from a short probe."""
    from ray_synth.budget.probe import forecast, share_cores

    found = forecast(run, until, shared=share_cores(run.config, reach)).as_dict()
    run.folder.write_json("estimate.json", found)
    return found


def _compare(run: Run, expected: dict[str, Any], total: float) -> None:
    """How far off the estimate was, in the log and in estimate.json."""
    from ray_synth.budget.estimate import compare

    done = run.stages.seconds()
    taken = {stage: done[stage] for stage in expected["seconds"] if stage in done}
    taken["around"] = total - sum(taken.values())
    run.folder.write_json("estimate.json", {**expected, "taken": taken})
    log.info("%s", compare(expected["seconds"], taken))


def inspected(run: Run) -> Run:
    """The run without its corrupt training images, each of which is decoded once."""
    data = run.stages.run("data", lambda: inspect_data(run))
    return replace(run, train=drop(run.train, data["corrupt"]))


def run_words(run: Run, service: Any, *, plan: bool = True) -> None:
    """The stages that ask the service: meanings and, with `plan`, prompts."""
    run.stages.run("meaning", lambda: resolve_meanings(run, service))
    if plan:
        run.stages.run("plan", lambda: write_plan(run, service))


def run_images(run: Run) -> None:
    """The stages that make all images of a plan."""
    run.stages.run("quality", lambda: measure_quality(run))
    run.stages.run("generation", lambda: generate(run))


def _run_stages(run: Run, until: str, tracker: Any) -> None:
    from ray_synth.service import Service

    done_at = {"data": 1, "meaning": 2, "plan": 3, "generation": 4, "training": 5}.get(until, 6)
    run = inspected(run)
    if done_at >= 2:
        with Service(run.config) as service:
            run_words(run, service, plan=done_at >= 3)
    if done_at >= 4:
        run.stages.run("quality", lambda: measure_quality(run))
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
        log.warning(
            "set aside %(image_id)s: %(error)s", item, extra={"sample_id": item["image_id"]}
        )
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
                tell_refused(entry["class_name"], entry["num_refused"])
                folder.write_json("meanings.partial.json", {"digest": digest, "entries": entries})
                bar.advance()
    else:
        entries = {name: {"class_name": name, "choice": name} for name in run.train.class_names}
    folder.write_json("meanings.json", [entries[name] for name in run.train.class_names])
    folder.delete("meanings.partial.json")
    return {name: entry["choice"] for name, entry in entries.items()}


def tell_refused(class_name: str, pieces: int) -> None:
    """A line of the run's log where answers of the language model were of no use."""
    if pieces:
        log.debug(
            "%s: %d pieces of the language model's answers were refused", class_name, pieces,
            extra={"class_name": class_name},
        )  # fmt: skip


def write_plan(run: Run, service: Any) -> dict[str, Any]:
    """contexts.json (what the LLM wrote, and what the pool had to add) and plan.parquet."""
    from ray_synth.prompting.contexts import Context
    from ray_synth.prompting.plan import ClassPrompts, plan_tables
    from ray_synth.prompting.styles import load_styles

    config, folder = run.config, run.folder
    meanings = {entry["class_name"]: entry["choice"] for entry in folder.read_json("meanings.json")}
    contexts: dict[str, Any] = {}
    digest = run.stages.digest("plan")
    if folder.exists("contexts.json"):
        saved = folder.read_json("contexts.json")
        contexts = saved["classes"] if saved["digest"] == digest else {}
    wants = set(config.prompting.mix) - {"plain"}
    if wants and config.prompting.contexts_per_class:
        todo = {name: meaning for name, meaning in meanings.items() if name not in contexts}
        with Bar("contexts", len(meanings), "classes", done=len(contexts)) as bar:
            for name, entry in service.write_contexts_all(todo, seed=config.seed):
                contexts[name] = entry
                tell_refused(name, entry["refused"])
                folder.write_json("contexts.json", {"digest": digest, "classes": contexts})
                bar.advance()
    guides = choose_references(run)
    classes = [
        ClassPrompts(
            index,
            name,
            meanings[name],
            [
                (Context(**entry["context"]), entry["source"])
                for entry in contexts.get(name, {}).get("contexts", [])
            ],
            guides.get(index, []),
        )
        for index, name in enumerate(run.train.class_names)
    ]
    count_tokens, limit = prompt_tokens(config.generation)
    limit = prompt_limit(config, count_tokens, limit)
    sources: Counter[str] = Counter()

    def tables() -> Iterator[pa.Table]:
        for table in plan_tables(
            classes,
            num_images=max(1, round(config.prompting.multiplier * len(run.train))),
            mix={str(kind): share for kind, share in config.prompting.mix.items()},
            styles=load_styles(config.prompting.styles),
            negative_prompt=config.prompting.negative_prompt,
            fingerprint=fingerprint(config.generation),
            seed=config.seed,
            count_tokens=count_tokens,
            max_tokens=limit,
        ):
            for item in pc.value_counts(table["context_source"]).to_pylist():
                sources[item["values"]] += item["counts"]
            yield table

    folder.write_tables("plan.parquet", PLAN_SCHEMA, tables())
    return {"num_synthetic": sources.total(), "context_sources": dict(sorted(sources.items()))}


def prompt_limit(config: Config, count_tokens: Callable[[str], int], limit: int) -> int:
    """Tokens that a prompt may have. Raises ValueError where what the user gave cannot fit."""
    given = config.prompting.max_tokens
    if given and given > limit:
        raise ValueError(
            f"prompting.max_tokens {given} is more than the {limit} tokens that the text encoder of "
            f"{config.generation.model!r} reads; the rest would be cut off"
        )
    length = count_tokens(config.prompting.negative_prompt)
    if length > limit:
        raise ValueError(
            f"prompting.negative_prompt is too long: {length} tokens, and the text encoder of "
            f"{config.generation.model!r} reads {limit}; shorten it"
        )
    return given or limit


def choose_references(run: Run) -> dict[int, list[str]]:
    """Ids, by class, of the real images that guide image-to-image rows; kept with the run."""
    reference = run.config.generation.reference
    if reference is None:
        return {}
    few = select(run.train, reference.images_per_class, run.config.seed)
    images: dict[str, bytes] = {}
    ids: dict[int, list[str]] = {}
    for row in read_index(few):
        images[row["image_id"]] = row["image"]
        ids.setdefault(row["class_index"], []).append(row["image_id"])
    write_references(run.folder, images)
    return {label: sorted(found) for label, found in ids.items()}


def measure_quality(run: Run) -> dict[str, Any]:
    """Thresholds of quality from real images' own scores, kept in `quality/`."""
    import ray

    checks, clip = run.config.generation.checks, run.config.meaning.clip
    if checks.policy == "off" or not checks.clip:
        return {"measured": False}
    folder = run.folder.child("quality")
    few = select(run.train, checks.real_images_per_class, run.config.seed)
    images: dict[int, list[bytes]] = {}
    for row in read_index(few):
        images.setdefault(row["class_index"], []).append(row["image"])
    meanings = dict(enumerate(run.folder.read_json("meanings.json")))
    per_class = max(1, len(PlanFile(run.folder)) // len(meanings))
    measure = ray.remote(num_cpus=clip.num_cpus, num_gpus=clip.num_gpus)(_measure_quality)
    ray.get(measure.remote(images, meanings, clip, checks, per_class, folder))
    return {"measured": True, "real_images": len(few)}


def _measure_quality(
    images: dict[int, list[bytes]],
    meanings: dict[int, dict[str, Any]],
    clip: ClipConfig,
    checks: QualityConfig,
    images_per_class: int,
    folder: Folder,
) -> None:
    """The task that measures, on a node that can hold the CLIP model."""
    from ray_synth.generation.thresholds import measure_reference, save_reference
    from ray_synth.meaning.candidates import with_article
    from ray_synth.meaning.clip import ClipModel

    texts = {
        index: with_article(entry["choice"])
        if entry["choice"] == entry["class_name"]
        else entry["choice"]
        for index, entry in meanings.items()
    }
    model = ClipModel(clip.model, clip.pretrained, device=clip.device, dtype=clip.dtype)
    reference = measure_reference(
        images,
        texts,
        model,
        clip_quantile=checks.clip_quantile,
        duplicate_quantile=checks.duplicate_quantile,
        images_per_class=images_per_class,
    )
    save_reference(folder, reference)


def generate(run: Run) -> dict[str, Any]:
    """Make what the store lacks of the plan."""
    from ray_synth.generation.cost import cost_note, store_facts
    from ray_synth.generation.stream import make_images, missing_chunks

    board = make_board()
    job = run.generation_job(board)
    chunks = missing_chunks(job)
    bars = {"images": Bar("generation", missing_rows(chunks), "images")} if chunks else {}
    with watch(board, bars, notes={"images": partial(cost_note, config=run.config)}):
        made = make_images(job, chunks)
    return {"made_in_this_stage": made, **store_facts(run.config, run.folder, run.store)}


def train(run: Run, tracker: Any) -> dict[str, Any]:
    """Train the real-only baseline and the mixed model; the latter while images are being made."""
    from ray_synth.generation.cost import cost_note
    from ray_synth.training.job import TrainJob, total_steps
    from ray_synth.training.trainer import run_training

    config, training = run.config, run.config.training
    steps = total_steps(training, len(run.train))
    num_synthetic = len(PlanFile(run.folder))
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
        with watch(board, bars, notes={"images": partial(cost_note, config=config)}):
            run_training(
                job,
                run.generation_job(board),
                real=run.train,
                run_name=f"{arm}-{run.stages.digest('training')}",
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
        "generation": generation["facts"],
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

    tracker = Tracker(run.config, run.runs, run.folder)
    tracker.datasets({"training": run.train, **run.tests})
    return tracker


def _track_results(run: Run, tracker: Any, metrics: dict[str, Any]) -> None:
    tracker.metrics({key: value for key, value in metrics.items() if key != "corrupt"})
    tracker.artifacts()
    if run.config.tracking.log_models:
        tracker.models()
    tracker.end()
