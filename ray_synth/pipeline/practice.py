"""Practice: the model in training says what it does not know, and the next images are made for that.

    round r: plan it, make its images, train on rounds up to r, score the learner; then round r + 1

Everything is found again by what lies in the run's folder: rounds (`plan/`), scores and learners
(`practice/`), images, checkpoints. What is done is skipped, and what is not goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_synth.config import Config
from ray_synth.errors import UserError
from ray_synth.generators.registry import generator_class
from ray_synth.meaning.entries import read_meanings
from ray_synth.prompting.rounds import (
    Rounds,
    cut_rounds,
    examples_file,
    join_rounds,
    learner_folder,
    read_rounds,
    scores_file,
    steering_learner,
    write_round,
)
from ray_synth.training import needs
from ray_synth.training.job import total_steps

if TYPE_CHECKING:
    from ray_synth.prompting.plan import ClassPrompts
    from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
SHOWN = 5  # classes, in the log


def rounds_of(run: Any) -> Rounds:
    """How the plan and the training of a `Run` are cut. Raises UserError as `cut_rounds`."""
    config = run.config
    planned = run.sizes.synthetic(config)
    assert config.prompting.practice is not None
    assert planned is not None
    steps = total_steps(run.arm_config("mixed"), len(run.train))
    return cut_rounds(config.prompting.practice, planned, len(run.train.class_names), steps)


def check_practice(run: Any) -> None:
    """Look for what cannot be done in rounds, and say what is unwise.

    Raises:
        UserError: a round would be too small or have no step; or images are imported, not made.
    """
    config = run.config
    practice = config.prompting.practice
    assert practice is not None
    rounds_of(run)
    if getattr(generator_class(config.generation.generator), "references", None) is not None:
        raise UserError(
            f"prompting.practice asks for images anew, and generator {config.generation.generator!r} has "
            "a set of them that is given: leave practice out"
        )
    if not len(run.validation):
        log.warning(
            "prompting.practice: data.validation holds no images out, so that the model says what it "
            "does not know on images that it was trained on: hold some out (data.validation: 10)"
        )
    if config.generation.checks.policy in ("off", "flag") and practice.by_kind:
        log.warning(
            "prompting.practice.by_kind gives more to images that the model is unsure of, and wrong ones "
            "are among them: have them rejected (generation.checks.policy: reject)"
        )

    if practice.apart and not reads_apart(config):
        log.warning(
            "prompting.practice.apart: %s is read with guidance alone, and guidance_scale %g of %s has "
            "none: classes that are taken for each other are not told apart; set apart: words, or null",
            practice.apart, config.generation.guidance_scale, config.generation.model,
        )  # fmt: skip


def reads_apart(config: Config) -> bool:
    """Whether the generator reads what `practice.apart` puts in prompts; plug-ins are taken to."""
    from ray_synth.generators.settings import family_of

    generation, practice = config.generation, config.prompting.practice
    if practice is None or practice.apart is None:
        return False
    if practice.apart == "words" or generation.generator != "diffusers":
        return True
    return (generation.guidance_scale or 0) > family_of(generation).guided_above


@dataclass(frozen=True)
class Work:
    """What a round takes of the stages, on the cluster.

    Attributes:
        fill: makes what the store lacks of the plan.
        train: the mixed arm up to a step; `num_synthetic`, `stop`, `segment` and `publish` of a TrainJob.
        prompts: the classes as a plan has them, with contexts of some classes, by name, in the places of
            those that they have.
        score: as `score_round`.
    """

    fill: Callable[[], Any]
    train: Callable[..., Any]
    prompts: Callable[[dict[str, Any]], list[ClassPrompts]]
    score: Callable[..., dict[str, Any]]


def practise(run: Any, work: Work) -> dict[str, Any]:
    """All rounds, each planned, made, trained on and scored; the mixed model is trained then.

    Returns:
        `practice`: rounds that were made, whether the rule ended them, and the images that it saved;
        `plan_digest`: of plan.parquet as it is now.
    """
    rounds = rounds_of(run)
    token = run.records.token("training")
    cards = read_rounds(run.folder, token)
    join_rounds(run.folder, cards)
    scores: list[dict[str, Any]] = []
    for number in range(len(rounds)):
        ended = _ended(run, scores)
        if number >= len(cards) and not ended:
            cards.append(plan_round(run, number, cards, scores[-1], work.prompts))
            join_rounds(run.folder, cards)
        known = _read_scores(run, number, token)
        if known is None:
            so_far = cards[: number + 1]
            rows = sum(card["rows"] for card in so_far)
            work.fill()
            last = ended or number == len(rounds) - 1
            learner = run.folder if last else run.folder.child(learner_folder(number))
            stop = rounds.stops[-1 if last else number]
            work.train(num_synthetic=rows, stop=stop, segment=number, publish=learner)
            known = {"token": token, **work.score(run, number, learner, so_far)}
            run.folder.write_json(scores_file(number), known)
        scores.append(known)
        if ended:
            break
    made = sum(card["rows"] for card in cards)
    found = {
        "rounds": len(cards), "of": len(rounds), "ended": len(cards) < len(rounds),
        "images": made, "images_saved": sum(rounds.images) - made,
    }  # fmt: skip
    return {"practice": found, "plan_digest": run.folder.digest("plan.parquet")}


def _ended(run: Any, scores: Sequence[dict[str, Any]]) -> bool:
    """Whether the rule says, after these rounds, that no more images are to be made."""
    from ray_synth.evaluation.stopping import enough
    from ray_synth.training.scores import unpacked

    practice = run.config.prompting.practice
    assert practice is not None
    if practice.stop is None or not scores:
        return False
    rights = [unpacked(s["real"]["right"], s["real"]["looked_at"]) for s in scores]
    if found := enough(rights, practice.stop):
        log.info(
            "practice: no more rounds after round %d: the last gained too little", len(scores) - 1
        )
    return found


def _read_scores(run: Any, number: int, token: str) -> dict[str, Any] | None:
    """What the learner said after a round, if it was trained and scored."""
    if not run.folder.exists(scores_file(number)):
        return None
    found = run.folder.read_json(scores_file(number))
    return found if found.get("token") == token else None


# What the learner says.


def score_round(
    run: Any, number: int, learner: Folder, cards: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What the learner says on validation images and on the newest round's."""
    import ray

    from ray_synth.generation.stream import stored_rows
    from ray_synth.training.scores import Sample, few_real, score_learner

    evaluation = run.config.evaluation
    real_set = "validation" if len(run.validation) else "training"
    rows = sum(card["rows"] for card in cards)
    stored = stored_rows(run.generation_job(), rows)
    real = few_real(run.validation if len(run.validation) else run.train)
    start = rows - cards[-1]["rows"]
    by_budget = sorted(cards[-1].get("budgets", {}).items(), key=lambda item: -item[1])
    shown = [name for name, _ in by_budget] or list(run.train.class_names)
    sample = Sample(
        run.folder, real, real_set, stored, start, rows, run.config.data.max_pixels,
        tuple(shown[:SHOWN]), examples_file(len(cards) - 1),
    )  # fmt: skip
    own = {"num_cpus": evaluation.num_cpus, "num_gpus": evaluation.num_gpus}
    task: Any = ray.remote(score_learner).options(**own)
    card = learner.read_json("models/mixed.json")
    digests = {
        bn: learner.digest(f"models/mixed.{bn}.safetensors") for bn in card["bns"] if bn != "blend"
    }
    record = {
        "round": number, "learner": digests,
        **ray.get(task.remote(learner, "mixed", sample)),
    }  # fmt: skip
    found = record["real"]
    log.info(
        "practice: after round %d, %d images, top-1 %.1f%% on %d %s images",
        number, rows, 100 * (1 - found.get("error", 1.0)), found["images"], real_set,
    )  # fmt: skip
    return record


# The next round.


def plan_round(
    run: Any,
    number: int,
    cards: Sequence[dict[str, Any]],
    scores: dict[str, Any],
    prompts: Callable[[dict[str, Any]], list[ClassPrompts]],
) -> dict[str, Any]:
    """Write a later round, made for what the learner does not know; its card says why."""
    from ray_synth.prompting.plan import plan_tables

    total = rounds_of(run).images[number]
    budgets, settings, why = _decided(run, total, scores)
    anew: dict[str, Any] = {}
    if run.config.prompting.practice.contexts:
        anew = _new_contexts(run, number, np.array([*why["weakness"].values()]), scores["token"])
    before = np.zeros(len(budgets), np.int64)
    for card in cards:
        for index, count in card["by_class"].items():
            before[int(index)] += count
    tables = plan_tables(
        _classes(run, prompts(anew), why["confused"], anew),
        num_images=total,
        budgets=budgets,
        number=number,
        before=before,
        unlike_in_words=run.config.prompting.practice.apart == "words",
        **settings,
    )
    kept = {
        "token": scores["token"],
        "steered_by": steering_learner(number),
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
        draws = needs.style_draws(styles, synthetic, practice.floor, draws)
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
    name = f"plan/contexts-{number:03}.json"
    kept = run.folder.read_json(name) if run.folder.exists(name) else {}
    if kept.get("token") == token:
        return kept["classes"]
    names = run.train.class_names
    entries = read_meanings(run.folder, names)
    meanings = {entry["class_name"]: entry["choice"] for entry in entries}
    weak = {names[at]: meanings[names[at]] for at in needs.weakest(weakness)}
    with Service(run.config) as service:
        found = dict(service.write_contexts_all(weak, seed=run.config.seed + number))
    written = {name: entry for name, entry in found.items() if entry["contexts"]}
    run.folder.write_json(name, {"token": token, "classes": written})
    return written
