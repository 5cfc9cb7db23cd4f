"""How often contexts and styles are drawn, by what the checks let pass of an earlier run's images.

An item is drawn less only where its images pass less often than those of the others for sure: the upper
end of the 95% interval of its share counts, against the share that is usual. So one of which few were
made is drawn as all are, and none is left out altogether.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from ray_synth.errors import UserError
from ray_synth.generation.acceptance import (
    ACCEPTANCE,
    SCENE_SCHEMA,
    SCENES,
    wilson,
)
from ray_synth.meaning.answers import FIELDS, phrase_key
from ray_synth.prompting.contexts import Context, context_key
from ray_synth.prompting.plan import ClassPrompts
from ray_synth.prompting.styles import Style
from ray_synth.storage.damage import damaged
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
DRAWS = "draws.json"
PASSES = 8  # an item is drawn in 1 to 8 of as many passes over all items


def draws(passed: Any, made: Any, usual: Any) -> np.ndarray:
    """In how many of `PASSES` passes an item is drawn, (n,) int64.

    Args:
        passed, made: (n,) images of each item.
        usual: share that passes of all items', or (n,) what is usual for each.
    """
    _, upper = wilson(passed, made)
    usual = np.broadcast_to(np.asarray(usual, float), upper.shape)
    share = np.divide(upper, usual, out=np.ones_like(upper), where=usual > 0)
    return np.clip(np.round(PASSES * share), 1, PASSES).astype(np.int64)


class EarlierRun:
    """What the checks let pass of a run's images.

    Args:
        folder: the run's, of which `generate`, `run` or `preview` have made images.

    Raises:
        UserError: its images were not checked.
        DamagedFile: what is kept of that is not what it was written as.
    """

    def __init__(self, folder: Folder) -> None:
        quality = folder.child("quality")
        for name in (ACCEPTANCE, SCENES):
            if not quality.exists(name):
                raise UserError(
                    f"prompting.acceptance: {folder.address()} has no quality/{name}; name a run whose "
                    "images were made and checked (ray-synth preview makes a few)"
                )
        self.styles = _counts(quality, quality.read_json(ACCEPTANCE), "style")
        scenes = quality.read_table(SCENES)
        if scenes.schema != SCENE_SCHEMA:
            raise damaged(quality.address(SCENES), "it has other columns than it is written with")
        self._scenes: dict[tuple[str, ...], np.ndarray] = {}  # class, phrases -> passed, made
        self._classes: dict[str, np.ndarray] = {}  # class -> passed, made
        # phrase of a field -> passed, made, and what is usual for the classes that it was said of
        self._phrases: dict[tuple[str, str], np.ndarray] = {}
        self._add(scenes)

    def _add(self, scenes: pa.Table) -> None:
        rows = scenes.to_pylist()
        for row in rows:
            found = self._classes.setdefault(row["class_name"], np.zeros(2))
            found += (row["passed"], row["made"])
        for row in rows:
            counts = np.array([row["passed"], row["made"]], float)
            keys = tuple(phrase_key(row[field]) for field in FIELDS)
            scene = self._scenes.setdefault((row["class_name"], *keys), np.zeros(2))
            scene += counts
            usual = row["made"] * self._share(row["class_name"])
            for field, key in zip(FIELDS, keys, strict=True):
                if key:
                    sums = self._phrases.setdefault((field, key), np.zeros(3))
                    sums += (*counts, usual)

    def _share(self, class_name: str) -> float:
        passed, made = self._classes.get(class_name, (0, 0))
        return passed / made if made else 0.0

    def style_draws(self, names: Iterable[str]) -> list[int]:
        """Of each style, against all styles; one that the run did not have is drawn as all are."""
        counts = np.array([self.styles.get(name, (0, 0)) for name in names], float).reshape(-1, 2)
        passed, made = np.array([*self.styles.values()], float).reshape(-1, 2).sum(axis=0)
        return draws(*counts.T, passed / made if made else 0.0).tolist()

    def context_draws(self, class_name: str, contexts: Sequence[Context]) -> list[int]:
        """Of each context of a class: by its own images, against all of the class; and by those of each
        of its phrases in all classes, against what is usual for these classes. The least counts.
        """
        if not contexts:
            return []
        keys = [context_key(context) for context in contexts]
        own = np.array([self._scenes.get((class_name, *key), (0, 0)) for key in keys], float)
        found = [draws(*own.T, self._share(class_name))]
        for at, field in enumerate(FIELDS):
            said = np.array([self._phrases.get((field, key[at]), (0, 0, 0)) for key in keys], float)
            usual = said[:, 2] / np.maximum(said[:, 1], 1)
            found.append(draws(said[:, 0], said[:, 1], usual))
        return np.min(found, axis=0).tolist()


def draws_of(
    place: str, classes: Sequence[ClassPrompts], styles: Sequence[Style], folder: Folder
) -> tuple[list[ClassPrompts], list[int]]:
    """The classes with how often each of their contexts is drawn, and how often each style is.

    Both are kept in the `draws.json` of a run's folder, beside the plan that they are for: what the
    earlier run's checks find later changes nothing there.

    Args:
        place: the earlier run's directory.

    Raises:
        UserError: as `EarlierRun`.
    """
    earlier = EarlierRun(Folder(place))
    names = [style.name for style in styles]
    of_styles = earlier.style_draws(names)
    drawn = []
    for known in classes:
        contexts = [context for context, _ in known.contexts]
        found = earlier.context_draws(known.class_name, contexts)
        drawn.append(replace(known, context_draws=found))
    of_contexts = {known.class_name: list(known.context_draws) for known in drawn}
    kept = {"acceptance": place, "of": PASSES, "styles": dict(zip(names, of_styles, strict=True))}
    folder.write_json(DRAWS, {**kept, "contexts": of_contexts})
    every = [number for found in of_contexts.values() for number in found]
    log.info(
        "drawn less, since their images failed more often in %s: %d of %d styles, %d of %d contexts",
        place, sum(number < PASSES for number in of_styles), len(names),
        sum(number < PASSES for number in every), len(every),
    )  # fmt: skip
    return drawn, of_styles


def _counts(quality: Folder, found: Mapping[str, Any], column: str) -> dict[str, tuple[int, int]]:
    """value -> (passed, made) of a column of `acceptance.json`."""
    counts = found.get(column) if isinstance(found, dict) else None
    pairs = counts.items() if isinstance(counts, dict) else [("", None)]
    for value, pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)):
            raise damaged(quality.address(ACCEPTANCE), f"{column} {value!r:.80} has no two numbers")
    return {value: (passed, made) for value, (passed, made) in pairs}
