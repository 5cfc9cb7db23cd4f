"""Classes came or went: a run goes on from an earlier one, and only what is new is asked and made.

A class is kept by its name, or by its earlier one where the user says that it was renamed. It keeps its
number, which decides the seeds of its rows, and what prompts call it; so its rows have the ids that they
had, and their images are found by them. `classes.json` keeps numbers and names for whatever comes next.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ray_synth.config import Config, TakeOverConfig, flatten
from ray_synth.data.labels import near_class
from ray_synth.errors import UserError, shortened
from ray_synth.meaning.entries import MEANINGS, read_meanings
from ray_synth.pipeline.records import StageRecords
from ray_synth.pipeline.sets import USED, listing
from ray_synth.prompting.contexts import kept_contexts
from ray_synth.prompting.plan_file import MOST_CLASSES, PLAN_FILE
from ray_synth.stages import changed
from ray_synth.storage.damage import damaged
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
CLASSES = "classes.json"
SHOWN = 5


@dataclass(frozen=True)
class KnownClass:
    """A class of a run that has taken over from another.

    Attributes:
        number: decides the seeds of its rows (`ClassPrompts.number`).
        said: what prompts call it.
        was: its name in the earlier run; None for a class that is new.
    """

    class_name: str
    number: int
    said: str
    was: str | None = None


def read_classes(folder: Folder) -> list[KnownClass]:
    """The classes of a run with their numbers, in its order. Raises DamagedFile."""
    if folder.exists(CLASSES):
        return [_known(item, folder) for item in folder.read_json(CLASSES)]
    names = [entry["class_name"] for entry in read_meanings(folder)]
    return [KnownClass(name, at, name) for at, name in enumerate(names)]


def _known(item: Any, folder: Folder) -> KnownClass:
    """What a file says of a class, which may be anything."""
    values = item if isinstance(item, dict) else {}
    name, number, said = (values.get(key) for key in ("class_name", "number", "said"))
    if not (isinstance(number, int) and isinstance(name, str) and isinstance(said, str)) or not (
        0 <= number < MOST_CLASSES
    ):
        raise damaged(folder.address(CLASSES), "an entry has no class_name, number and said")
    was = values.get("was")
    return KnownClass(name, number, said, was if isinstance(was, str) else None)


def check_take_over(config: Config, class_names: tuple[str, ...], folder: Folder) -> None:
    """What a run is to go on from, before anything is spent.

    Raises:
        UserError: there is no finished plan, a name is no class of it, or images were checked otherwise.
    """
    asked = config.take_over
    if asked is None:
        return
    earlier = Folder(asked.run)
    if earlier.uri == folder.uri:
        raise UserError(
            f"take_over.run is the run itself: give this one a new name, --set name={config.name}-2"
        )
    if not all(earlier.exists(name) for name in ("stages/plan.json", MEANINGS, PLAN_FILE)):
        raise UserError(f"take_over.run: {earlier.address()} holds no run with a finished plan")
    before = {known.class_name for known in read_classes(earlier)}
    _check_names(asked, before, set(class_names))
    checks = "generation.checks."
    if earlier.exists("stages/quality.json") and (
        found := _differences(
            earlier, "quality", flatten(config.model_dump(mode="json")), (checks,)
        )
    ):
        raise UserError(
            f"take_over.run: images of {earlier.address()} were checked otherwise, and keep what was "
            f"found: {shortened(found, SHOWN)}; set it as it was there, or begin without take_over"
        )


def _check_names(asked: TakeOverConfig, before: set[str], now: set[str]) -> None:
    for setting, name, known, what in (
        *(("renamed", old, before, "of the earlier run") for old in asked.renamed),
        *(("split", old, before, "of the earlier run") for old in asked.split),
        *(("renamed", new, now, "of data.train") for new in asked.renamed.values()),
        *(("split", new, now, "of data.train") for news in asked.split.values() for new in news),
    ):
        if name not in known:
            hint = near_class(name, known)
            raise UserError(f"take_over.{setting}: {name!r} is no class {what}{hint}")
    twice = set(asked.renamed) & set(asked.split)
    there = [old for old in asked.renamed if old in now]
    held = [new for new in asked.renamed.values() if new in before]
    names = list(asked.renamed.values())
    if twice or len(set(names)) < len(names):
        name = next(iter(twice), "") or next(name for name in names if names.count(name) > 1)
        raise UserError(f"take_over: {name!r} comes twice in renamed and split")
    if there or held:
        name = (there or held)[0]
        raise UserError(
            f"take_over.renamed: {name!r} is a class of both runs, so that its images are its own"
        )


# Numbers and names.


def settle_classes(run: Any) -> list[KnownClass]:
    """The classes of a run with their numbers; kept in its folder where it takes over from another."""
    names, asked = run.train.class_names, run.config.take_over
    if asked is None:
        return [KnownClass(name, at, name) for at, name in enumerate(names)]
    before = {known.class_name: known for known in read_classes(Folder(asked.run))}
    split = {new for news in asked.split.values() for new in news}
    was = {name: name for name in before if name not in asked.renamed and name not in asked.split}
    was |= {new: old for old, new in asked.renamed.items()}
    free = max((known.number for known in before.values()), default=-1) + 1
    found = []
    for name in names:
        old = was.get(name) if name not in split else None
        if old is None:
            found.append(KnownClass(name, free, name))
            free += 1
        else:
            found.append(KnownClass(name, before[old].number, before[old].said, old))
    new = [known.class_name for known in found if known.was is None]
    gone = sorted(set(before) - {known.was for known in found})
    log.info(
        "%d of %d classes are those of %s; new: %s; gone: %s", len(found) - len(new), len(found),
        Folder(asked.run).address(), shortened(new, SHOWN) or "none",
        shortened(gone, SHOWN) or "none",
    )  # fmt: skip
    run.folder.write_json(CLASSES, [asdict(known) for known in found])
    return found


def known_classes(run: Any) -> list[KnownClass]:
    """As `settle_classes` left them."""
    if run.config.take_over is not None and run.folder.exists(CLASSES):
        return read_classes(run.folder)
    return settle_classes(run)


# Meanings and scenes.


def taken_meanings(run: Any, told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries of meanings.json that hold, by class name: of the same settings and real images.

    Args:
        told: what the user says of each class, as an entry keeps it.
    """
    asked = run.config.take_over
    classes = settle_classes(run)
    if asked is None:
        return {}
    earlier = Folder(asked.run)
    inputs = run.records.inputs["meaning"]
    if found := _differences(earlier, "meaning", inputs, ("meaning.", "seed")):
        log.warning("all meanings are resolved anew: %s", shortened(found, SHOWN))
        return {}
    entries = {entry["class_name"]: entry for entry in read_meanings(earlier)}
    other = _other_images(run, earlier, classes)
    taken: dict[str, dict[str, Any]] = {}
    for known in classes:
        entry = entries.get(known.was or "")
        if entry is None or known.class_name in other:
            continue
        if entry.get("told") == told.get(known.class_name):
            taken[known.class_name] = {
                **entry, "class_name": known.class_name, "taken_over": earlier.address(),
            }  # fmt: skip
    if other:
        names = shortened(sorted(other), SHOWN)
        log.info("their real images are others now, so their meanings are asked anew: %s", names)
    return taken


def taken_contexts(run: Any, meanings: dict[str, str]) -> dict[str, Any]:
    """Scenes that hold, by class name: of the same settings and meaning."""
    asked = run.config.take_over
    if asked is None:
        return {}
    earlier = Folder(asked.run)
    keys = ("meaning.llm.", "seed", "prompting.contexts_per_class")
    if not earlier.exists("contexts.json") or _differences(
        earlier, "plan", run.records.inputs["plan"], keys
    ):
        return {}
    scenes = earlier.read_json("contexts.json")["classes"]
    before = {entry["class_name"]: entry["choice"] for entry in read_meanings(earlier)}
    return {
        known.class_name: {**scenes[known.was], "taken_over": True}
        for known in known_classes(run)
        if known.was in scenes and before[known.was] == meanings[known.class_name]
    }


def taken_counts(run: Any, images: dict[str, int]) -> dict[str, Any]:
    """For metrics.json: meanings, scenes and images that were taken over, and made; {} without."""
    if run.config.take_over is None:
        return {}
    entries = read_meanings(run.folder)
    scenes = kept_contexts(run.folder)

    def counts(items: list[dict[str, Any]]) -> dict[str, int]:
        taken = sum(bool(item.get("taken_over")) for item in items)
        return {"taken": taken, "made": len(items) - taken}

    return {
        "run": Folder(run.config.take_over.run).address(),
        "meanings": counts(entries),
        "contexts": counts(list(scenes.values())),
        "images": images,
    }


def _differences(
    earlier: Folder, stage: str, now: dict[str, Any], keys: tuple[str, ...]
) -> list[str]:
    """Settings of some keys with which an earlier run's stage was done otherwise."""
    record = StageRecords(earlier, {}).record(stage) or {"inputs": {}}
    before = record["inputs"]

    def some(inputs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in inputs.items() if key.startswith(keys)}

    return changed(some(before), some(now))


def _other_images(run: Any, earlier: Folder, classes: list[KnownClass]) -> set[str]:
    """Kept classes whose real images are not those of the earlier run.

    Of pictures in folders the contents count, by the digests that both runs have kept; of files of many
    images, and of those that ship with the package, their number.
    """
    record = StageRecords(earlier, {}).record("data") or {"result": {}}
    before = record["result"].get("counts") or {}
    now = run.train.counts()
    other = {
        known.class_name
        for known in classes
        if known.was is not None and now[known.class_name] != before.get(known.was)
    }
    name = listing("data.train")
    if not (earlier.exists(name) and run.folder.exists(name)):
        return other
    kept, mine = earlier.read_table(name), run.folder.read_table(name)
    mine = mine.filter(pc.and_(pc.greater_equal(mine["row"], 0), pc.equal(mine["role"], USED)))
    if not len(mine) or pc.all(pc.less(kept["row"], 0)).as_py():
        return other
    strange = pc.and_(pc.is_valid(mine["mark"]), pc.invert(pc.is_in(mine["mark"], kept["mark"])))
    if run.config.data.train.images_per_class is not None:  # others of the same files may be drawn
        strange = pc.and_(strange, pc.is_in(mine["name"], kept["name"]))
    labels = run.sets.labelled.label[mine.filter(strange)["row"].to_numpy()]
    changed_names = {run.train.class_names[label] for label in np.unique(labels).tolist()}
    return other | (changed_names & {known.class_name for known in classes if known.was})
