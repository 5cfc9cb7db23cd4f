"""The stages that ask the language model and CLIP: meanings, then contexts and the plan."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.config import Config
from ray_synth.data.dataset import images_by_class, read_index, select
from ray_synth.errors import UserError
from ray_synth.generation.maker import write_references
from ray_synth.generation.store import PLAN_SCHEMA
from ray_synth.generators.registry import fingerprint, prompt_tokens
from ray_synth.monitoring.progress import Bar

if TYPE_CHECKING:
    from ray_synth.pipeline.run import Run
    from ray_synth.prompting.contexts import Context

log = logging.getLogger("ray_synth")


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
        images = images_by_class(few)
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
    from ray_synth.prompting.plan import ClassPrompts, plan_tables

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
            read_contexts(contexts.get(name, {})),
            guides.get(index, []),
        )
        for index, name in enumerate(run.train.class_names)
    ]
    sources: Counter[str] = Counter()

    def tables() -> Iterator[pa.Table]:
        for table in plan_tables(
            classes,
            num_images=max(1, round(config.prompting.multiplier * len(run.train))),
            **plan_settings(config),
        ):
            for item in pc.value_counts(table["context_source"]).to_pylist():
                sources[item["values"]] += item["counts"]
            yield table

    folder.write_tables("plan.parquet", PLAN_SCHEMA, tables())
    return {"num_synthetic": sources.total(), "context_sources": dict(sorted(sources.items()))}


def read_contexts(answer: dict[str, Any]) -> list[tuple[Context, str]]:
    """The scenes that the service wrote for a class, each with its source."""
    from ray_synth.prompting.contexts import Context

    return [(Context(**item["context"]), item["source"]) for item in answer.get("contexts", [])]


def plan_settings(config: Config) -> dict[str, Any]:
    """What of a config decides a plan, as `plan_tables` takes it. Raises UserError as `prompt_limit`."""
    from ray_synth.prompting.styles import load_styles

    count_tokens, limit = prompt_tokens(config.generation)
    return {
        "mix": {str(kind): share for kind, share in config.prompting.mix.items()},
        "styles": load_styles(config.prompting.styles),
        "negative_prompt": config.prompting.negative_prompt,
        "fingerprint": fingerprint(config.generation),
        "seed": config.seed,
        "count_tokens": count_tokens,
        "max_tokens": prompt_limit(config, count_tokens, limit),
    }


def prompt_limit(config: Config, count_tokens: Callable[[str], int], limit: int) -> int:
    """Tokens that a prompt may have. Raises UserError where what the user gave cannot fit."""
    given = config.prompting.max_tokens
    if given and given > limit:
        raise UserError(
            f"prompting.max_tokens {given} is more than the {limit} tokens that the text encoder of "
            f"{config.generation.model!r} reads; the rest would be cut off"
        )
    length = count_tokens(config.prompting.negative_prompt)
    if length > limit:
        raise UserError(
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
