"""The rounds of a plan: how large each is, and the files that keep them and say what decided them.

Round 0 is the start of the plan that there would be without rounds. Each is a table of its own,
`plan/round-000.parquet`, beside a card, `plan/round-000.json`, that is written when the table is there.
plan.parquet is all rounds so far, one after the other: whoever reads a plan knows of no rounds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_synth.config import PracticeConfig
from ray_synth.errors import UserError
from ray_synth.generators.learner import Steering
from ray_synth.prompting.budgets import even_shares
from ray_synth.prompting.plan_file import PLAN_FILE, PLAN_SCHEMA, WINDOW
from ray_synth.storage.damage import damaged
from ray_synth.storage.folder import Folder

ROUNDS, PRACTICE = "plan", "practice"  # folders of a run
CARD = re.compile(r"round-(\d+)\.json")


def round_file(number: int) -> str:
    """The table of a round, in the run's folder."""
    return f"{ROUNDS}/round-{number:03}.parquet"


def round_card(number: int) -> str:
    """What decided a round, beside its table."""
    return f"{ROUNDS}/round-{number:03}.json"


def contexts_file(number: int) -> str:
    """Scenes that were written anew for a round."""
    return f"{ROUNDS}/contexts-{number:03}.json"


def scores_file(number: int) -> str:
    """What the learner says after it was trained on rounds up to this one."""
    return f"{PRACTICE}/scores-{number:03}.json"


def learner_folder(number: int) -> str:
    """Where the learner lies as it was then, as `model_files.load_model` reads it (arm `mixed`)."""
    return f"{PRACTICE}/learner-{number:03}"


def examples_file(number: int) -> str:
    """A few images of the round, for the report."""
    return f"{PRACTICE}/examples-{number:03}.parquet"


def steering_learner(number: int) -> str | None:
    """The folder, in the run's, of the learner that a round is made for; None for round 0, which there is
    no learner for."""
    return learner_folder(number - 1) if number else None


def steering_of(practice: PracticeConfig, run: Folder, number: int) -> Steering | None:
    """What the learner that a round is made for does in the making of its images; None where that is
    nothing."""
    learner = steering_learner(number)
    if learner is None or not (practice.guidance or practice.select):
        return None
    return Steering(run, learner, practice.guidance, practice.select)


def steerings(practice: PracticeConfig, run: Folder) -> tuple[tuple[int, Steering], ...]:
    """From which row of the plan on what steers, for the rounds that are planned."""
    found, first = [], 0
    if practice.guidance or practice.select:
        for card in read_rounds(run):
            if steering := steering_of(practice, run, card["round"]):
                found.append((first, steering))
            first += card["rows"]
    return tuple(found)


@dataclass(frozen=True)
class Rounds:
    """How a plan and a training are cut.

    Attributes:
        images: of each round.
        stops: the optimizer step at which training on rounds up to each one ends; the last is the
            training's own end.
    """

    images: tuple[int, ...]
    stops: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.images)

    def planned(self, number: int) -> int:
        """Images of all rounds before one."""
        return sum(self.images[:number])


def cut_rounds(practice: PracticeConfig, planned: int, classes: int, steps: int) -> Rounds:
    """The rounds of a plan of so many images, and of a training of so many steps.

    Later rounds share evenly what round 0 leaves; each image has the same steps ahead per image that was
    there when it came, as steps are cut like images.

    Raises:
        UserError: a round would have fewer images than there are classes, or no step.
    """
    rounds = practice.rounds
    first = round(planned * (1 / rounds if practice.first is None else practice.first))
    images = (first, *even_shares(rounds - 1, planned - first).tolist())
    if min(images) < classes:
        at = images.index(min(images))
        raise UserError(
            f"prompting.practice: round {at} of {rounds} has {images[at]} of {planned} images, fewer "
            f"than the {classes} classes: take fewer rounds, {'a larger' if at == 0 else 'a smaller'} "
            "first, or a higher prompting.multiplier"
        )
    stops = [round(steps * sum(images[: number + 1]) / planned) for number in range(rounds)]
    if min(stop - start for start, stop in zip([0, *stops], stops, strict=False)) < 1:
        raise UserError(
            f"prompting.practice: {steps} optimizer steps cannot be cut into {rounds} parts, one for "
            "each round: raise training.steps (or epochs), or take fewer rounds"
        )
    return Rounds(images, tuple(stops))


def write_round(
    folder: Folder, number: int, tables: Iterable[pa.Table], card: dict[str, Any]
) -> dict[str, Any]:
    """Keep a round and its card; the card, with the rows of each class and the table's digest.

    Args:
        tables: schema `PLAN_SCHEMA`.
    """
    counts: dict[str, int] = {}

    def counted() -> Iterator[pa.Table]:
        for table in tables:
            for item in table["class_index"].value_counts().to_pylist():
                key = str(item["values"])
                counts[key] = counts.get(key, 0) + item["counts"]
            yield table

    folder.write_tables(round_file(number), PLAN_SCHEMA, counted())
    ordered = dict(sorted(counts.items(), key=lambda item: int(item[0])))
    found = {
        "round": number,
        "rows": sum(counts.values()),
        "digest": folder.digest(round_file(number)),
        "by_class": ordered,
        **card,
    }
    folder.write_json(round_card(number), found)
    return found


def read_rounds(folder: Folder, token: str | None = None) -> list[dict[str, Any]]:
    """The cards of the rounds that are planned, in order; none where the run has no rounds.

    Args:
        token: of the training that later rounds are planned for; those of another do not count.
    """
    there = set(folder.child(ROUNDS).names(".json"))
    found: list[dict[str, Any]] = []
    while round_card(len(found)).removeprefix(f"{ROUNDS}/") in there:
        card = folder.read_json(round_card(len(found)))
        if found and token is not None and card.get("token") != token:
            break
        found.append(card)
    return found


def join_rounds(folder: Folder, cards: Sequence[dict[str, Any]]) -> None:
    """Write plan.parquet: the rows of these rounds, one after the other."""

    def tables() -> Iterator[pa.Table]:
        for number in range(len(cards)):
            with folder.open_table(round_file(number)) as file:
                for batch in file.iter_batches(WINDOW):
                    yield pa.Table.from_batches([batch], schema=PLAN_SCHEMA)

    folder.write_tables(PLAN_FILE, PLAN_SCHEMA, tables())


def check_rounds(folder: Folder) -> None:
    """Raises DamagedFile where a round is not the file that was written."""
    for card in read_rounds(folder):
        name = round_file(card["round"])
        if not folder.exists(name) or folder.digest(name) != card["digest"]:
            raise damaged(folder.address(name), "it is gone, or was changed since it was written")


def clear_rounds(folder: Folder) -> None:
    """Delete all rounds, and what learners said of them; of a run without rounds nothing is touched."""
    for name in (ROUNDS, PRACTICE):
        child = folder.child(name)
        # Cards first: a round without one does not count.
        for file in sorted(child.names(), key=lambda file: not file.endswith(".json")):
            child.delete(file)
