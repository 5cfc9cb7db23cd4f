"""How often contexts and styles are drawn, by what the checks let pass of an earlier run's images.

An item is drawn less by the share of its images that is expected to pass, against the share that is
usual. Of few images little is expected: shares are drawn towards the usual one, by as much as all items'
shares differ no more than by chance (empirical Bayes with a beta prior, its strength by moments;
Kleinman, JASA 68, 1973). So where chance alone tells the items apart, all are drawn alike; none is left
out, and none is drawn more.
"""

from __future__ import annotations

import logging
import math
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


def draws(passed: Any, made: Any, usual: Any, strength: float) -> np.ndarray:
    """In how many of `PASSES` passes an item is drawn, (n,) int64.

    Args:
        passed, made: (n,) images of each item.
        usual: share that passes of all items', or (n,) what is usual for each.
        strength: images of the usual share that each item is taken to have beside its own (`prior`).
    """
    passed, made = np.asarray(passed, float), np.asarray(made, float)
    usual = np.broadcast_to(np.asarray(usual, float), made.shape)
    # (passed + strength * usual) / (made + strength) / usual, also where the strength is infinite
    own = made / (made + strength) if math.isfinite(strength) else np.zeros(made.shape)
    ratio = passed / np.maximum(made * usual, 1e-9)
    share = np.where(usual > 0, 1 + own * (ratio - 1), 1.0)
    return np.clip(np.round(PASSES * share), 1, PASSES).astype(np.int64)


def prior(passed: Any, made: Any, usual: Any) -> float:
    """The strength of the beta prior of some items' shares, in images; infinite where they differ by no
    more than chance.

    Args: as of `draws`.
    """
    passed, made = np.asarray(passed, float), np.asarray(made, float)
    chance = usual * (1 - np.asarray(usual, float))
    # of a beta binomial: E (passed - made usual)^2 = made chance (1 + (made - 1) rho)
    more = ((passed - made * usual) ** 2 - made * chance).sum()
    most = (made * (made - 1) * chance).sum()
    rho = min(float(more / most), 1.0) if most > 0 else 0.0
    return 1 / rho - 1 if rho > 0 else math.inf


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
        self._classes: dict[str, np.ndarray] = {}  # class -> passed, made
        # (class, phrases) and (field, phrase) -> passed, made, and what is usual for their classes
        self._scenes: dict[tuple[str, ...], np.ndarray] = {}
        self._phrases: dict[tuple[str, str], np.ndarray] = {}
        self._add(scenes)
        self._priors = self._fit()

    def _add(self, scenes: pa.Table) -> None:
        rows = scenes.to_pylist()
        for row in rows:
            found = self._classes.setdefault(row["class_name"], np.zeros(2))
            found += (row["passed"], row["made"])
        for row in rows:
            keys = tuple(phrase_key(row[field]) for field in FIELDS)
            counts = (row["passed"], row["made"], row["made"] * self._share(row["class_name"]))
            scene = self._scenes.setdefault((row["class_name"], *keys), np.zeros(3))
            scene += counts
            for field, key in zip(FIELDS, keys, strict=True):
                if key:
                    sums = self._phrases.setdefault((field, key), np.zeros(3))
                    sums += counts

    def _fit(self) -> dict[str, float]:
        """The strength of the prior of scenes ("") and of each field's phrases."""
        groups: dict[str, list[np.ndarray]] = {"": [*self._scenes.values()]}
        for (field, _), counts in self._phrases.items():
            groups.setdefault(field, []).append(counts)
        return {name: prior(*_columns(rows)) for name, rows in groups.items()}

    def _share(self, class_name: str) -> float:
        passed, made = self._classes.get(class_name, (0, 0))
        return passed / made if made else 0.0

    def style_draws(self, names: Iterable[str]) -> list[int]:
        """Of each style, against all styles; one that the run did not have is drawn as all are."""
        known = np.array([*self.styles.values()], float).reshape(-1, 2)
        passed, made = known.sum(axis=0)
        usual = passed / made if made else 0.0
        counts = np.array([self.styles.get(name, (0, 0)) for name in names], float).reshape(-1, 2)
        strength = prior(known[:, 0], known[:, 1], usual)
        return draws(counts[:, 0], counts[:, 1], usual, strength).tolist()

    def context_draws(self, class_name: str, contexts: Sequence[Context]) -> list[int]:
        """Of each context of a class: by its own images, against all of the class; and by those of each
        of its phrases in all classes, against what is usual for these classes. The least counts.
        """
        if not contexts:
            return []
        keys = [context_key(context) for context in contexts]
        nothing = np.zeros(3)
        own = [self._scenes.get((class_name, *key), nothing) for key in keys]
        found = [draws(*_columns(own), self._priors[""])]
        for at, field in enumerate(FIELDS):
            said = [self._phrases.get((field, key[at]), nothing) for key in keys]
            found.append(draws(*_columns(said), self._priors.get(field, math.inf)))
        return np.min(found, axis=0).tolist()


def _columns(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Passed, made, and the usual share, of rows of passed, made, and what is usual to pass."""
    passed, made, usual = np.array(rows, float).reshape(-1, 3).T
    return passed, made, usual / np.maximum(made, 1)


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
    pairs: dict[str, Any] = counts if isinstance(counts, dict) else {"": None}
    for value, pair in pairs.items():
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)):
            raise damaged(quality.address(ACCEPTANCE), f"{column} {value!r:.80} has no two numbers")
    return {value: (passed, made) for value, (passed, made) in pairs.items()}
