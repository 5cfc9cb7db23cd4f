"""All stages of a run, in the paper's order: read it from top to bottom.

Each reads what the ones before it left in the run directory, and leaves its own (stages.py has the
table). The same command run again skips what is done and continues what is not.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.data.class_info import read_class_info
from ray_synth.data.dataset import ImagesByClass, read_index, select
from ray_synth.generation.chunks import missing_rows
from ray_synth.generation.maker import write_references
from ray_synth.generators.registry import generator_class
from ray_synth.meaning.entries import read_meanings
from ray_synth.monitoring.progress import Bar, make_board, watch
from ray_synth.pipeline.commits import fetch_generator
from ray_synth.pipeline.kept import choices_digest
from ray_synth.pipeline.run import Run
from ray_synth.pipeline.sets import are_found, found_again, inspect_tests, inspect_training
from ray_synth.pipeline.take_over import known_classes, taken_contexts, taken_meanings
from ray_synth.pipeline.taken_images import take_images
from ray_synth.preflight.demands import asks_for_contexts
from ray_synth.prompting.contexts import kept_contexts
from ray_synth.prompting.plan import ClassPrompts
from ray_synth.prompting.plan_file import PLAN_FILE, PLAN_SCHEMA, PlanFile
from ray_synth.prompting.plan_settings import read_contexts
from ray_synth.stages import up_to
from ray_synth.storage.journal import Journal
from ray_synth.training.job import TrainJob, total_steps

log = logging.getLogger("ray_synth")
GUIDES_PER_CLASS = 16  # real images that take turns in image-to-image generation


def run_stages(run: Run, until: str, tracker: Any = None) -> None:
    """All stages up to one; those that are done are skipped."""
    from ray_synth.service.session import Service

    wanted = up_to(until)
    run = inspected(run)
    if "meaning" in wanted:
        with Service(run.config) as service:
            run_words(run, service, plan="plan" in wanted)
    if "quality" in wanted:
        run_quality(run)
    first = run.config.training.feed == "stored" or run.config.take_over is not None
    if practises(run):
        if "generation" in wanted and "training" not in wanted:
            fill_store(run)  # of the rounds that are planned so far
    elif "generation" in wanted and (first or "training" not in wanted):
        run.records.run("generation", lambda: generate(run))
    if "training" in wanted:
        run.records.run("training", lambda: train(run, tracker))
        # What training left of the plan is made now: the store ends whole.
        run.records.run("generation", lambda: generate(run))
    if "evaluation" in wanted:
        run.records.run("evaluation", lambda: evaluate_models(run))


def inspected(run: Run) -> Run:
    """The run with all its sets looked at: training without its corrupt images."""
    inspect_tests(run.config, run.sets, run.records, run.kept_in)
    given = run.config, run.sets, run.records, run.folder
    found = are_found(run.records)  # when the run was opened
    run.records.run("data", lambda: inspect_training(*given))
    return run if found else replace(run, sets=found_again(*given))


def run_words(run: Run, service: Any, *, plan: bool = True) -> None:
    """The stages that ask the service: meanings and, with `plan`, prompts."""
    run.records.run("meaning", lambda: resolve_meanings(run, service))
    if plan:
        run.records.run("plan", lambda: write_plan(run, service))


def run_quality(run: Run) -> None:
    """The stage that measures real images, which generated ones are then held against."""
    run.records.run("quality", lambda: measure_quality(run))


def run_images(run: Run) -> None:
    """The stages that make all images of a plan; with practice, those that are planned so far."""
    run_quality(run)
    if practises(run):
        fill_store(run)
    else:
        run.records.run("generation", lambda: generate(run))


def practises(run: Run) -> bool:
    """Whether further rounds of the plan are up to training, which is not done."""
    practice = run.config.prompting.practice
    return practice is not None and run.records.record("training") is None


# Stage "meaning": label ambiguity resolution, section 3.1.


def resolve_meanings(run: Run, service: Any) -> dict[str, Any]:
    """One entry of meanings.json per class, kept as each is resolved."""
    config, folder, names = run.config, run.folder, run.train.class_names
    journal = Journal(folder, "meanings", run.records.token("meaning"))
    told = read_class_info(config.data.class_info, names)
    said = {name: info.model_dump() for name, info in told.items()}
    entries = taken_meanings(run, said) | journal.entries()
    if config.meaning.enabled:
        few = select(run.train, config.meaning.num_images, config.seed)
        images = ImagesByClass(few)
        every = ((name, images[i]) for i, name in enumerate(names) if len(entries) < len(names))
        with Bar("meaning", len(names), "classes", done=len(entries)) as bar:
            for entry in service.resolve_all(
                every, seed=config.seed, known=set(entries), told=told
            ):
                name = entry["class_name"]
                entries[name] = {**entry, "told": said[name]} if name in said else entry
                _tell_refused(name, entry["num_refused"])
                journal.add(name, entries[name])
                bar.advance()
    else:
        entries = {name: {"class_name": name, "choice": name} for name in names} | entries
    folder.write_json("meanings.json", [entries[name] for name in names])
    journal.clear()
    return {name: entry["choice"] for name, entry in entries.items()}


def _tell_refused(class_name: str, pieces: int) -> None:
    """A line of the run's log where answers of the language model were of no use."""
    if pieces:
        log.debug(
            "%s: %d pieces of the language model's answers were refused", class_name, pieces,
            extra={"class_name": class_name},
        )  # fmt: skip


# Stage "plan": prompt diversification, section 3.2.


def write_plan(run: Run, service: Any) -> dict[str, Any]:
    """contexts.json (what the LLM wrote, and what the pool had to add) and plan.parquet; with practice,
    round 0 of it."""
    from ray_synth.generation.draws import draws_of
    from ray_synth.pipeline.practice import rounds_of
    from ray_synth.prompting.budgets import class_budgets, within
    from ray_synth.prompting.plan import plan_tables
    from ray_synth.prompting.plan_settings import plan_settings
    from ray_synth.prompting.rounds import clear_rounds, join_rounds, round_file, write_round

    config, folder = run.config, run.folder
    clear_rounds(folder)
    entries = read_meanings(folder, run.train.class_names)
    meanings = {entry["class_name"]: entry["choice"] for entry in entries}
    contexts = _written_contexts(run, service, meanings)
    guides = choose_references(run)
    classes = class_prompts(run, meanings, contexts, guides)
    num_images = run.sizes.synthetic(config)
    assert num_images is not None
    budgets = class_budgets(config.prompting, run.train.counts())
    if guides and config.generation.reference is None:  # imported images, each of them once
        there = [len(guides.get(index, ())) for index in range(len(classes))]
        budgets = within(budgets, num_images, there)
        log.info("%d images of %d that were asked for are there", budgets.sum(), num_images)
        num_images = int(budgets.sum())
    sources: Counter[str] = Counter()
    shortened: Counter[str] = Counter()
    settings = plan_settings(config)
    if config.prompting.acceptance:
        earlier, styles = config.prompting.acceptance, settings["styles"]
        classes, settings["style_draws"] = draws_of(earlier, classes, styles, folder)
    if config.prompting.practice:
        num_images = rounds_of(run).images[0]

    def tables() -> Iterator[pa.Table]:
        for table in plan_tables(
            classes, num_images=num_images, budgets=budgets, shortened=shortened, **settings
        ):
            for item in pc.value_counts(table["context_source"]).to_pylist():
                sources[item["values"]] += item["counts"]
            yield table

    if config.prompting.practice:
        join_rounds(folder, [write_round(folder, 0, tables(), {})])
    else:
        folder.write_tables(PLAN_FILE, PLAN_SCHEMA, tables())
    _tell_shortened(shortened, sources.total(), settings["max_tokens"])
    written = round_file(0) if config.prompting.practice else PLAN_FILE
    return {
        "num_synthetic": sources.total(),
        "context_sources": dict(sorted(sources.items())),
        "shortened": dict(sorted(shortened.items())),
        "digest": folder.digest(written),
        "meanings": choices_digest(meanings),
        **({"rounds": True} if config.prompting.practice else {}),
    }


def class_prompts(
    run: Run, meanings: dict[str, str], contexts: dict[str, Any], guides: dict[int, list[str]]
) -> list[ClassPrompts]:
    """What is known of each class when its prompts are written, in the order of the classes.

    Args:
        contexts: by class name, what the service wrote.
        guides: as `choose_references` gives them.
    """
    return [
        ClassPrompts(
            index,
            known.class_name,
            meanings[known.class_name],
            read_contexts(contexts.get(known.class_name, {})),
            guides.get(index, []),
            known.number,
            known.said,
        )
        for index, known in enumerate(known_classes(run))
    ]


def kept_prompts(run: Run, anew: dict[str, Any]) -> list[ClassPrompts]:
    """As `class_prompts`, from what the stages before have kept.

    Args:
        anew: contexts of some classes, by name, in the places of those that they have.
    """
    entries = read_meanings(run.folder, run.train.class_names)
    meanings = {entry["class_name"]: entry["choice"] for entry in entries}
    contexts = {**kept_contexts(run.folder), **anew}
    return class_prompts(run, meanings, contexts, choose_references(run))


def _tell_shortened(shortened: Counter[str], rows: int, limit: int) -> None:
    """A warning where prompts lost some of their words."""
    if cut := shortened["meaning"] + shortened["name"]:
        log.warning(
            "%d of %d prompts had more than the %d tokens that the text encoder reads: their meaning "
            "(%d) or name (%d) was shortened; shorter class names, or a generator that reads more, keep "
            "them whole",
            cut, rows, limit, shortened["meaning"], shortened["name"],
        )  # fmt: skip


def _written_contexts(run: Run, service: Any, meanings: dict[str, str]) -> dict[str, Any]:
    """The scenes of each class by its name, kept as each is written; none where none are asked for."""
    config, folder = run.config, run.folder
    contexts: dict[str, Any] = {}
    token = run.records.token("plan")
    if folder.exists("contexts.json"):
        saved = folder.read_json("contexts.json")
        contexts = saved["classes"] if saved["digest"] == token else {}
    if not asks_for_contexts(config):
        return contexts
    journal = Journal(folder, "contexts", token)
    contexts = taken_contexts(run, meanings) | contexts | journal.entries()
    todo = {name: meaning for name, meaning in meanings.items() if name not in contexts}
    with Bar("contexts", len(meanings), "classes", done=len(contexts)) as bar:
        for name, entry in service.write_contexts_all(todo, seed=config.seed):
            contexts[name] = entry
            _tell_refused(name, entry["refused"])
            journal.add(name, entry)
            bar.advance()
    folder.write_json("contexts.json", {"digest": token, "classes": contexts})
    journal.clear()
    return contexts


def choose_references(run: Run) -> dict[int, list[str]]:
    """By class, the ids of the real images that guide image-to-image rows, which are kept with the run;
    or what the generator itself says that rows name (`references`)."""
    generation = run.config.generation
    own = getattr(generator_class(generation.generator), "references", None)
    if own is not None:
        return own(generation, run.train.class_names, run.config.seed)
    if generation.reference is None:
        return {}
    few = select(run.train, GUIDES_PER_CLASS, run.config.seed)
    images: dict[str, bytes] = {}
    ids: dict[int, list[str]] = {}
    for row in read_index(few):
        images[row["image_id"]] = row["image"]
        ids.setdefault(row["class_index"], []).append(row["image_id"])
    write_references(run.folder, images)
    return {label: sorted(found) for label, found in ids.items()}


# Stages "quality" and "generation".


def measure_quality(run: Run, per_class: int | None = None) -> dict[str, Any]:
    """Thresholds of quality from real images' own scores, kept in `quality/`.

    Args:
        per_class: real images that are measured; default: `thresholds.REAL_PER_CLASS`.
    """
    import ray

    from ray_synth.generation.thresholds import REAL_PER_CLASS, measure_run

    checks, clip = run.config.generation.checks, run.config.meaning.clip
    if not checks.need_clip:
        return {"measured": False}
    few = select(run.train, per_class or REAL_PER_CLASS, run.config.seed)
    images = ImagesByClass(few)
    meanings = read_meanings(run.folder, run.train.class_names)
    planned = len(PlanFile(run.folder))
    if run.config.prompting.practice:  # all rounds: the reference is measured once
        planned = run.sizes.synthetic(run.config) or planned
    made_per_class = max(1, planned // len(meanings))
    measure = ray.remote(num_cpus=clip.num_cpus, num_gpus=clip.num_gpus)(measure_run)
    folder = run.folder.child("quality")
    ray.get(measure.remote(images, meanings, clip, checks, made_per_class, folder))
    return {"measured": True, "real_images": len(few)}


def generate(run: Run) -> dict[str, Any]:
    """Make what the store lacks of the plan; an earlier run's images first, where it goes on from one."""
    from ray_synth.generation.cost import store_facts

    taken = take_images(run, lambda plan: fill_store(run, plan)) if run.config.take_over else {}
    made = fill_store(run) + taken.get("made", 0)
    facts = store_facts(run.config, run.folder, run.store)
    return {"made_in_this_stage": made, "taken_over": taken, **facts}


def fill_store(run: Run, plan: PlanFile | None = None) -> int:
    """Make what the store lacks of a plan, by default the run's; how many images."""
    from ray_synth.generation.cost import cost_note
    from ray_synth.generation.stream import make_images, missing_chunks

    job = replace(run.generation_job(), plan=plan or PlanFile(run.folder))
    chunks = missing_chunks(job)
    if not chunks:
        return make_images(job, chunks)  # packs what is small
    fetch_generator(run.config)
    board = make_board()
    bars = {"made": Bar("generation", missing_rows(chunks), "images")}
    with watch(board, bars, notes={"made": partial(cost_note, config=run.config)}):
        return make_images(replace(job, board=board), chunks)


# Stage "training": section 3.3.


def train(run: Run, tracker: Any) -> dict[str, Any]:
    """Train the baselines, then the mixed model; the latter while images are being made, or in rounds."""
    seconds: dict[str, float] = {}
    more: dict[str, Any] = {}
    for arm in run.arms:
        started = time.perf_counter()
        if arm == "mixed" and run.config.prompting.practice:
            more = train_in_rounds(run, tracker)
        else:
            planned = len(PlanFile(run.folder)) if arm == "mixed" else 0
            train_arm(run, arm, tracker, num_synthetic=planned)
        seconds[arm] = time.perf_counter() - started
    steps = total_steps(run.arm_config("mixed"), len(run.train))
    return {"seconds": seconds, "steps": steps, **more}


def train_in_rounds(run: Run, tracker: Any) -> dict[str, Any]:
    """The mixed model, and the rounds that it steers; see `practise`."""
    from ray_synth.pipeline.practice import Work, practise, score_round

    work = Work(
        fill=lambda: fill_store(run),
        train=partial(train_arm, run, "mixed", tracker),
        prompts=partial(kept_prompts, run),
        score=score_round,
    )
    return practise(run, work)


def train_arm(run: Run, arm: str, tracker: Any, *, num_synthetic: int, **part: Any) -> None:
    """Train one arm, or the next part of it.

    Args:
        num_synthetic: so many first rows of the plan are trained on.
        part: fields of `TrainJob` that say which part.
    """
    from ray_synth.generation.cost import cost_note
    from ray_synth.training.brief import is_brief_baseline, is_brief_part, train_briefly
    from ray_synth.training.trainer import run_training

    streamed = arm == "mixed" and run.config.training.feed != "stored"
    if streamed:
        fetch_generator(run.config)
    board = make_board()
    job = _train_job(run, arm, tracker, board, num_synthetic=num_synthetic, **part)
    bars = {f"steps/{arm}": Bar(f"training {arm}", job.end, "steps")}
    if streamed:
        passed = job.fresh_from if run.config.training.feed == "live" else 0
        bars["images"] = Bar("generation", num_synthetic - passed, "images")
    with watch(board, bars, notes={"images": partial(cost_note, config=run.config)}):
        alone = not job.mixed and is_brief_baseline(job.config, job.steps, len(job.real))
        if alone or is_brief_part(job):
            train_briefly(job, _run_name(run, arm))
        else:
            run_training(job, run.generation_job(board), run_name=_run_name(run, arm))


def _train_job(run: Run, arm: str, tracker: Any, board: Any, **part: Any) -> TrainJob:
    own = {"num_synthetic": 0, "board": board, **part}
    return run.train_job(arm, tracking=tracker.handle if tracker else None, **own)


def _run_name(run: Run, arm: str) -> str:
    return f"{arm}-{run.records.token('training')}"


# Stage "evaluation".


def blend_bns(run: Run) -> None:
    """`models/mixed.blend.safetensors`: both BNs, by a weight chosen on the validation images."""
    import ray

    from ray_synth.evaluation.blend import few_of, write_blend

    evaluation = run.config.evaluation
    own = {"num_cpus": evaluation.num_cpus, "num_gpus": evaluation.num_gpus}
    work: Any = ray.remote(write_blend)
    images = list(read_index(few_of(run.validation)))
    chosen = ray.get(work.options(**own).remote(run.folder, images, run.config.data.max_pixels))
    if chosen is not None:
        log.info(
            "blend of both BNs: %g of the auxiliary one; on validation images %.1f%% (main %.1f%%), on "
            "corrupted copies of them %.1f%% (main %.1f%%)",
            chosen["weight"], chosen["clean"], chosen["main"]["clean"], chosen["corrupted"],
            chosen["main"]["corrupted"],
        )  # fmt: skip


def evaluate_models(run: Run) -> dict[str, Any]:
    """Test all models on all test sets: results by model, BN and test set, as metrics.json has them."""
    from ray_synth.evaluation.predictor import evaluate

    config = run.config
    if "blend" in config.evaluation.bns and "mixed" in run.arms:
        blend_bns(run)
    board = make_board()
    total = sum(len(index) for index in run.tests.values())
    with watch(board, {"tested": Bar("evaluation", total, "images")}):
        results, corrupt = evaluate(
            run.tests,
            folder=run.folder,
            arms=run.arms,
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
