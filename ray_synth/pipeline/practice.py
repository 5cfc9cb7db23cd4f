"""Practice: the model in training says what it does not know, and the next images are made for that.

    round r: plan it, make its images, train on rounds up to r, score the learner; then round r + 1

With `training.feed: stored` a round's images are made before its training, else while it trains.

Everything is found again by what lies in the run's folder: rounds (`plan/`), scores and learners
(`practice/`), images, checkpoints. What is done is skipped, and what is not goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_synth.errors import UserError
from ray_synth.generation.usefulness import check_selection
from ray_synth.generators.registry import check_guidance, generator_class
from ray_synth.pipeline.next_round import plan_round, reads_apart, scenes_of
from ray_synth.prompting.rounds import (
    Rounds,
    cut_rounds,
    examples_file,
    join_rounds,
    learner_folder,
    read_rounds,
    scores_file,
)
from ray_synth.training.job import STATE_FILE, total_steps

if TYPE_CHECKING:
    from ray_synth.prompting.plan import ClassPrompts
    from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
SHOWN = 5  # classes of a round of which images are kept for the report


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
        UserError: a round would be too small or have no step; images are imported, not made; or the
            model cannot steer this generator as it is asked to.
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
    if practice.guidance:
        check_guidance(config.generation)
    if practice.select:
        check_selection(config.generation)
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


@dataclass(frozen=True)
class Work:
    """What a round takes of the stages, on the cluster.

    Attributes:
        fill: makes what the store lacks of the plan.
        train: the mixed arm up to a step; what says which part of a TrainJob it is.
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
            total = rounds.images[number]
            cards.append(plan_round(run, number, total, cards, scores[-1], work.prompts))
            join_rounds(run.folder, cards)
        known = _read_scores(run, number, token)
        if known is None:
            so_far = cards[: number + 1]
            last = ended or number == len(rounds) - 1
            learner = run.folder if last else run.folder.child(learner_folder(number))
            streamed = run.config.training.feed != "stored"
            if not streamed:
                work.fill()
            before = run.folder.child(learner_folder(number - 1)) if number else None
            resume = before if before and before.exists(STATE_FILE) else None
            work.train(publish=learner, resume=resume, **_part(rounds, number, so_far, ended))
            if streamed:  # what training left of the round
                work.fill()
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


def _part(
    rounds: Rounds, number: int, cards: Sequence[dict[str, Any]], ended: bool
) -> dict[str, int]:
    """Which part of the training follows a round: fields of a TrainJob."""
    rows = [card["rows"] for card in cards]
    return {
        "num_synthetic": sum(rows),
        "fresh_from": 0 if ended else sum(rows[:-1]),
        "begin": rounds.stops[number - 1] if number else 0,
        "stop": rounds.stops[-1 if ended else number],
        "segment": number,
    }


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
        tuple(shown[:SHOWN]), examples_file(len(cards) - 1), scenes_of(run, len(cards) - 1),
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
