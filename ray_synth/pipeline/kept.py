"""What finished stages left is looked at before a run goes on from it.

A file that was cut off or edited is named, with the fix; a store that lost images is filled again.
"""

from __future__ import annotations

import logging
from typing import Any

from ray_synth.errors import shortened
from ray_synth.generation.checking import suspects
from ray_synth.meaning.entries import MEANINGS, read_meanings
from ray_synth.pipeline.records import input_digest
from ray_synth.prompting.plan_file import PLAN_FILE, PlanFile
from ray_synth.prompting.rounds import check_rounds
from ray_synth.storage.damage import damaged
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
SHOWN = 5  # in a message


def check_kept(run: Any) -> None:
    """Hold what a `Run`'s stages left against their records; nothing is written.

    A store that has lost or damaged parts makes its stage one that is to be done again: what is missing
    is made then, and nothing else.

    Raises:
        DamagedFile: a plan or meanings that are not as their stage left them.
    """
    records, folder = run.records, run.folder
    meaning, plan = records.record("meaning"), records.record("plan")
    if meaning is not None:
        entries = read_meanings(folder, run.train.class_names)
        _check_choices(folder, entries, meaning["result"], plan["result"] if plan else None)
    if plan is not None:
        training = records.record("training")
        check_plan(folder, plan["result"], training["result"] if training else {})
    if records.record("generation") is not None and (lost := suspects(run.store)):
        log.warning(
            "%d file(s) of %s are damaged or gone, and their images are made again: %s",
            len(lost), run.store.folder.address(), shortened(lost, SHOWN),
        )  # fmt: skip
        records.refill("generation")


def choices_digest(choices: dict[str, str]) -> str:
    """Of the meaning of each class: a plan keeps which ones it was written with."""
    return input_digest(dict(choices))


def _check_choices(
    folder: Folder,
    entries: list[dict[str, Any]],
    found: dict[str, str],
    plan: dict[str, Any] | None,
) -> None:
    """Choices that were edited go into a plan that is still to be written; a finished one has its own."""
    choices = {entry["class_name"]: entry["choice"] for entry in entries}
    edited = [
        f"{name!r}: {choice!r}" for name, choice in choices.items() if found.get(name) != choice
    ]
    if plan is not None and "meanings" in plan:
        if plan["meanings"] != choices_digest(choices):
            raise damaged(
                folder.address(MEANINGS),
                f"changed since {PLAN_FILE} was written with it; now {shortened(edited, SHOWN)}",
                "put a copy back, or write a plan with these meanings by --force-stage plan",
            )
    elif edited and plan is None:
        log.warning("%s was edited; as it says now, %s", MEANINGS, shortened(edited, SHOWN))


def check_plan(
    folder: Folder, result: dict[str, Any], training: dict[str, Any] | None = None
) -> None:
    """Raises DamagedFile where the plan is not the file that its stage wrote.

    Of a plan in rounds each round is looked at; plan.parquet, which joins them, once training is done:
    until then it is written anew when training goes on.

    Args:
        result, training: of these stages; of a training that is not done, nothing.
    """
    if result.get("rounds"):
        check_rounds(folder)
        digest = (training or {}).get("plan_digest")
        if digest and folder.digest(PLAN_FILE) != digest:
            raise damaged(folder.address(PLAN_FILE), "it was changed since it was written")
        return
    rows = len(PlanFile(folder))
    if rows != result["num_synthetic"]:
        why = f"it has {rows} rows and was written with {result['num_synthetic']}"
        raise damaged(folder.address(PLAN_FILE), why)
    if "digest" in result and folder.digest(PLAN_FILE) != result["digest"]:
        raise damaged(folder.address(PLAN_FILE), "it was changed since it was written")
