"""Which language model for the meanings? `python jobs/llms.py --backends backends.yaml`.

The classes of a config's real training images are resolved with one backend after the other, in this
process and without Ray; CLIP and the images are the same for all. Ends with a Markdown table, and a last
line of JSON. `backends.yaml` maps names to settings as under `meaning.llm`:

    small: {model: embedded}
    chat: {model: embedded, style: chat}
    server: {backend: openai, model: Qwen/Qwen3-8B, base_url: "http://localhost:8000/v1"}
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer
import yaml

from jobs.llms_table import markdown, read_backends, read_truth, same_meaning
from jobs.meaning_models import MeaningModels
from ray_synth.cli.command import prepare_process
from ray_synth.config import Config, LlmConfig, load_config
from ray_synth.data.class_names import read_class_names
from ray_synth.data.dataset import hold_out, load_index, read_index, select
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError
from ray_synth.meaning.backends import load_llm
from ray_synth.meaning.background import Background, beside, shipped_background
from ray_synth.meaning.candidates import Candidate, candidate_texts
from ray_synth.meaning.clip import load_clip
from ray_synth.meaning.comparison import Outcome, compare
from ray_synth.meaning.lexicon import installed_lexicon
from ray_synth.meaning.ranking import unit_means

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
log = logging.getLogger("ray_synth")
Load = Callable[[LlmConfig], Any]


def main(
    backends: Annotated[Path, typer.Option(help="names to settings as under meaning.llm")],
    config: Annotated[Path, typer.Option("--config", "-c")] = QUICKSTART,
    truth: Annotated[Path | None, typer.Option(help="class names to accepted words")] = None,
    out: Annotated[Path | None, typer.Option(help="write the table to this file too")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Resolve all classes with every backend, and compare."""
    settings = load_config(config, overrides)
    listed = read_backends(_read(backends), origin=str(backends))
    table, found = compare_backends(settings, listed, _read(truth) if truth else None)
    print(table)
    if out:
        out.write_text(table + "\n")
    print(json.dumps(found))
    if all("problem" in row for row in found["rows"]):
        raise typer.Exit(1)


def compare_backends(
    settings: Config, backends: dict[str, LlmConfig], truth: Any = None, *, load: Load = load_llm
) -> tuple[str, dict[str, Any]]:
    """The Markdown, and the same as a mapping.

    Args:
        truth: see `read_truth`.
        load: a backend's model; one is held at a time.

    Raises:
        UserError: the data or the truth is wrong. What is wrong with a backend is said in its row.
    """
    meaning = settings.meaning
    clip = load_clip(meaning.clip)
    lexicon = installed_lexicon(meaning.lexicon)
    images = class_features(settings, clip)
    whole = Background.of(np.concatenate(list(images.values())))
    shipped = shipped_background(clip)
    accepted = read_truth(truth, images) if truth is not None else None
    questions = [
        {
            "class_name": class_name,
            "image_features": features,
            "background": beside(whole.without(features), shipped),
            "num_meanings": meaning.num_meanings,
            "retries": meaning.retries,
            "context": meaning.context,
            "seed": settings.seed,
        }
        for class_name, features in images.items()
    ]

    def resolve(llm: Any) -> list[dict[str, Any]]:
        models = MeaningModels(
            llm,
            clip,
            temperature=meaning.clip.temperature,
            merge_at=meaning.clip.merge_similarity,
            senses=lexicon.candidates if lexicon else None,
        )
        return models.resolve_all(questions)

    outcomes = []
    for name, backend in backends.items():
        log.info("%s: %s", name, backend.model)
        outcomes.append(ask(name, backend, resolve, load))
        free_memory()
    features = choice_features(outcomes, clip)
    same = same_meaning(features, merge_at=meaning.clip.merge_similarity or clip.merge_similarity)
    rows = compare(outcomes, same=same, truth=accepted)
    choices = {
        name: {o.name: o.choices()[name] for o in outcomes if not o.problem} for name in images
    }
    found = {"verb": "llms", "clip": meaning.clip.model, "rows": rows, "choices": choices}
    return markdown(rows, outcomes, same=same), found


def class_features(settings: Config, clip: Any) -> dict[str, np.ndarray]:
    """Class name -> (images, dim) unit rows of the images that the pipeline would judge it by."""
    data = settings.data
    index = load_index(data.train, read_class_names(data.class_names))
    index, _ = hold_out(index, data.validation)
    index = select(index, data.train.images_per_class, settings.seed)
    pictures: dict[str, list[Any]] = {name: [] for name in index.class_names}
    for row in read_index(select(index, settings.meaning.num_images, settings.seed)):
        try:
            picture = decode_image(row["image"], max_pixels=data.max_pixels)
        except UserError as error:
            log.warning("left out %s: %s", row["image_id"], error)
            continue
        pictures[index.class_names[row["class_index"]]].append(picture)
    empty = [name for name, listed in pictures.items() if not listed]
    if empty:
        raise UserError(f"data.train: no image of {', '.join(map(repr, empty[:5]))} can be used")
    return {name: clip.encode_images(listed) for name, listed in pictures.items()}


def ask(name: str, backend: LlmConfig, resolve: Callable[[Any], Any], load: Load) -> Outcome:
    """One backend's outcome; whatever goes wrong with it is part of that."""
    try:
        llm = load(backend)
        before = _spent(llm)
        started = time.perf_counter()
        entries = resolve(llm)
        seconds = time.perf_counter() - started
    except Exception as error:  # a library's own error too must not end the other backends
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        why = next(iter(str(error).strip().splitlines()), "no reason given")
        return Outcome(name, backend.model, problem=(kind + why)[:300])
    questions, prompts, answers = (_spent(llm) - before).tolist()
    return Outcome(name, backend.model, entries, seconds, questions, prompts, answers)


def choice_features(outcomes: list[Outcome], clip: Any) -> dict[str, np.ndarray]:
    """Unit row of each choice, as its candidate was embedded."""
    chosen = {
        entry["choice"]: Candidate(entry["choice"], entry["candidates"][0]["source"])
        for outcome in outcomes
        for entry in outcome.entries
    }
    texts = [text for candidate in chosen.values() for text in candidate_texts(candidate)]
    if not texts:
        return {}
    rows = clip.encode_texts(texts)
    return dict(zip(chosen, unit_means(rows.reshape(len(chosen), -1, rows.shape[1])), strict=True))


def free_memory() -> None:
    """Give back what the last model held: the next one may need it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _spent(llm: Any) -> np.ndarray:
    usage = llm.usage
    return np.array([usage.questions, usage.prompt_tokens, usage.answer_tokens])


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


if __name__ == "__main__":
    prepare_process()
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
