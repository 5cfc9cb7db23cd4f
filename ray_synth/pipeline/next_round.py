"""The next round: what a learner said of itself becomes budgets, prompts and a table of rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_synth.config import Config
from ray_synth.generation.acceptance import scene_text
from ray_synth.meaning.entries import read_meanings
from ray_synth.prompting.contexts import kept_contexts
from ray_synth.prompting.rounds import (
    contexts_file,
    steering_learner,
    steering_of,
    write_round,
)
from ray_synth.training import needs

if TYPE_CHECKING:
    from ray_synth.prompting.plan import ClassPrompts

log = logging.getLogger("ray_synth")
SHOWN = 5  # classes, in the log


def reads_apart(config: Config) -> bool:
    """Whether the generator reads what `practice.apart` puts in prompts; plug-ins are taken to."""
    from ray_synth.generators.settings import family_of

    generation, practice = config.generation, config.prompting.practice
    if practice is None or practice.apart is None:
        return False
    if practice.apart == "words" or generation.generator != "diffusers":
        return True
    return (generation.guidance_scale or 0) > family_of(generation).guided_above


def plan_round(
    run: Any,
    number: int,
    total: int,
    cards: Sequence[dict[str, Any]],
    scores: dict[str, Any],
    prompts: Callable[[dict[str, Any]], list[ClassPrompts]],
) -> dict[str, Any]:
    """Write a later round, made for what the learner does not know; its card says why, and is returned.

    Args:
        total: images that it has.
        cards, scores: of the rounds before, and of the learner after them.
        prompts: as `practice.Work.prompts`.
    """
    from ray_synth.prompting.plan import plan_tables

    budgets, settings, why = _decided(run, total, scores)
    anew: dict[str, Any] = {}
    if run.config.prompting.practice.contexts:
        anew = _new_contexts(run, number, np.array([*why["weakness"].values()]), scores["token"])
    before = np.zeros(len(budgets), np.int64)
    for card in cards:
        for index, count in card["by_class"].items():
            before[int(index)] += count
    practice = run.config.prompting.practice
    if steering := steering_of(practice, run.folder, number):
        settings["fingerprint"] = steering.fingerprint(settings["fingerprint"])
    classes = _classes(run, prompts(anew), why["confused"], anew)
    if practice.by_kind:
        classes = [_scenes_drawn(known, scores["synthetic"], practice.floor) for known in classes]
    tables = plan_tables(
        classes,
        num_images=total,
        budgets=budgets,
        number=number,
        before=before,
        unlike_in_words=practice.apart == "words",
        **settings,
    )
    kept = {
        "token": scores["token"],
        "steered_by": steering_learner(number),
        "steering": steering.facts() if steering else None,
        "learner": scores["learner"],
        **why,
        "new_contexts": sorted(anew),
        "seed": run.config.seed,
    }
    card = write_round(run.folder, number, tables, kept)
    first = sorted(why["budgets"], key=lambda name: -why["budgets"][name])[:SHOWN]
    log.info("practice: round %d has %d images, most of %s", number, total, ", ".join(first))
    return card


def _decided(
    run: Any, total: int, scores: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """Budgets by class, the settings of `plan_tables`, and the same for a card, with what decided it."""
    from ray_synth.prompting.plan_settings import plan_settings

    practice, names = run.config.prompting.practice, run.train.class_names
    settings = plan_settings(run.config)
    styles = [style.name for style in settings["styles"]]
    draws = _kept_style_draws(run)
    classes = scores["real"]["classes"]
    weakness = needs.class_weakness(classes)
    even = np.full(len(names), 0.5)
    budgets = needs.class_images(total, weakness if practice.by_class else even, practice.floor)
    if practice.by_kind:
        synthetic = scores["synthetic"]
        settings["mix"] = needs.kind_mix(settings["mix"], synthetic, practice.floor)
        seen, accepted = synthetic["style"], synthetic["accepted"]["style"]
        draws = needs.item_draws(styles, seen, accepted, practice.floor, draws)
    settings["style_draws"] = draws
    why = {
        "weakness": dict(zip(names, weakness.round(6).tolist(), strict=True)),
        "budgets": dict(zip(names, budgets.tolist(), strict=True)),
        "mix": settings["mix"],
        "styles": dict(zip(styles, draws or [1] * len(styles), strict=True)),
        "confused": needs.confused_pairs(classes) if reads_apart(run.config) else {},
    }
    return budgets, settings, why


def _classes(
    run: Any, classes: list[ClassPrompts], pairs: dict[str, str], anew: dict[str, Any]
) -> list[ClassPrompts]:
    """The classes with what they are taken for, and how often their contexts are drawn."""
    from ray_synth.generation.draws import DRAWS
    from ray_synth.prompting.fitting import subject

    drawn = run.folder.read_json(DRAWS)["contexts"] if run.config.prompting.acceptance else {}
    by_name = {known.class_name: known for known in classes}
    # A meaning that follows "not" would read as what the image is of.
    in_words = run.config.prompting.practice.apart == "words"
    found = []
    for known in classes:
        own, unlike = drawn.get(known.class_name, ()), ""
        if other := by_name.get(pairs.get(known.class_name, "")):
            name = other.said or other.class_name
            unlike = subject(name, "" if in_words else other.meaning)
        own = () if known.class_name in anew else own
        found.append(replace(known, unlike=unlike, context_draws=own))
    return found


def _scenes_drawn(known: ClassPrompts, synthetic: dict[str, Any], floor: float) -> ClassPrompts:
    """A class whose scenes are drawn by what their images are worth, as kinds and styles are."""
    scenes = [scene_text(asdict(context)) for context, _ in known.contexts]
    seen = synthetic.get("context", {}).get(known.class_name, {})
    if not set(seen) & set(scenes):
        return known
    accepted = synthetic["accepted"]["context"].get(known.class_name, {})
    drawn = needs.item_draws(scenes, seen, accepted, floor, known.context_draws)
    return replace(known, context_draws=drawn)


def scenes_of(run: Any, number: int) -> dict[str, list[dict[str, str]]]:
    """The scenes of each class in a round: those that were written, for some classes anew."""
    anew = _written_anew(run, number, run.records.token("training")) or {}
    written = {**kept_contexts(run.folder), **anew}
    return {
        class_name: [item["context"] for item in entry["contexts"]]
        for class_name, entry in written.items()
    }


def _kept_style_draws(run: Any) -> list[int]:
    """How often each style was drawn in round 0, by the order of the styles."""
    from ray_synth.generation.draws import DRAWS

    if not run.config.prompting.acceptance:
        return []
    return list(run.folder.read_json(DRAWS)["styles"].values())


def _new_contexts(run: Any, number: int, weakness: np.ndarray, token: str) -> dict[str, Any]:
    """Scenes that the language model writes anew for the weakest classes, by class name; kept beside the
    round."""
    from ray_synth.preflight.demands import asks_for_contexts
    from ray_synth.service.session import Service

    if not asks_for_contexts(run.config):
        return {}
    if (kept := _written_anew(run, number, token)) is not None:
        return kept
    names = run.train.class_names
    entries = read_meanings(run.folder, names)
    meanings = {entry["class_name"]: entry["choice"] for entry in entries}
    weak = {names[at]: meanings[names[at]] for at in needs.weakest(weakness)}
    with Service(run.config) as service:
        found = dict(service.write_contexts_all(weak, seed=run.config.seed + number))
    written = {name: entry for name, entry in found.items() if entry["contexts"]}
    run.folder.write_json(contexts_file(number), {"token": token, "classes": written})
    return written


def _written_anew(run: Any, number: int, token: str) -> dict[str, Any] | None:
    """The scenes that were written anew for a round of this training; None where none are kept."""
    name = contexts_file(number)
    kept = run.folder.read_json(name) if run.folder.exists(name) else {}
    return kept["classes"] if kept.get("token") == token else None
