"""The stages of a run, in the paper's order: one table that every room reads.

A stage that is done is skipped. What invalidates it are its own settings and those of all stages before
it: only those that are marked `result` in config/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray_synth.config import Config, changes_result, default_of, flatten, of_today
from ray_synth.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as in `stages/<name>.json`, `--until` and `--force-stage`.
        needs: the stage that must be done before it.
        leaves: files and folders of the run directory that hold what it made.
        settings: dotted keys of the config that decide its result; `generator` is the fingerprint of
            the image generator. Other settings of the same stages leave it valid.
        bars: names of the progress bars that show it, or the start of one.
        says: what it does, for people.
    """

    name: str
    needs: str | None
    leaves: tuple[str, ...]
    settings: tuple[str, ...]
    bars: tuple[str, ...]
    says: str

    @property
    def shown(self) -> str:
        """What of it a person looks at first."""
        return self.leaves[-1] if self.leaves else f"stages/{self.name}.json"


TABLE = (
    Stage(
        "data", None, (),
        ("seed", "data.train", "data.validation", "data.class_names", "data.max_pixels"), (),
        "decode every real image once",
    ),
    Stage(
        "meaning", "data", ("meanings.json",), ("meaning", "data.class_info", "take_over"),
        ("meaning",),
        "resolve what each class name means (paper, section 3.1)",
    ),
    Stage(
        "plan", "meaning", ("contexts.json", "plan.parquet"),
        ("prompting", "generator", "generation.reference"), ("contexts",),
        "write the prompts of all images (section 3.2)",
    ),
    Stage(
        "quality", "plan", ("quality",), ("generation.checks",), (),
        "measure thresholds on real images",
    ),
    Stage("generation", "quality", ("images",), (), ("generation",), "make the images"),
    Stage(
        "training", "generation", ("checkpoints", "models"), ("training",), ("training ",),
        "train on real and synthetic images (section 3.3)",
    ),
    Stage(
        "evaluation", "training", (), ("evaluation", "data.test", "data.ood"), ("evaluation",),
        "test in domain and out of it",
    ),
)  # fmt: skip
STAGES = tuple(stage.name for stage in TABLE)
# Settings that are an input only where they are given: digests of runs without them stay what they were.
WHERE_GIVEN = ("data.class_info", "take_over", "prompting.practice")
FILES = (
    "files of "  # with a set's setting, an input besides the settings: a digest of the set's files
)
REPORT = "report"  # written again whenever it is asked for: no stage that is done or not


def up_to(until: str) -> tuple[str, ...]:
    """The stages up to one, or all for `report`.

    Raises:
        UserError: there is no such stage.
    """
    if until == REPORT:
        return STAGES
    return STAGES[: _place(until) + 1]


def from_on(stage: str) -> tuple[str, ...]:
    """A stage and all that follow it, which are to be done again with it. Raises as `up_to`."""
    return STAGES[_place(stage) :]


def stage_of(name: str) -> Stage:
    """The stage of a name. Raises as `up_to`."""
    return TABLE[_place(name)]


def _place(name: str) -> int:
    if name not in STAGES:
        raise UserError(f"unknown stage {name!r}; {did_you_mean(name, [*STAGES, REPORT])}")
    return STAGES.index(name)


def times(seconds: dict[str, float]) -> list[tuple[str, bool, float]]:
    """Seconds by stage for people: (label, whether it is a part of the stage above, seconds), in order.

    Args:
        seconds: as metrics.json has them; `training_mixed` is a part of `training`, `total` no stage.
    """
    rows = []
    for stage in STAGES:
        parts = [name for name in seconds if name.startswith(f"{stage}_")]
        if stage in seconds:
            rows.append((stage, False, seconds[stage]))
        for name in parts:
            rows.append((name.removeprefix(f"{stage}_").replace("_", " "), True, seconds[name]))
    return rows


def stage_inputs(config: Config, generator: str) -> dict[str, dict[str, Any]]:
    """For each stage, the settings that its result depends on, those of earlier stages included.

    Args:
        generator: fingerprint of the image generator.

    Returns:
        Flat mappings of dotted key to value.
    """
    values = {**config.model_dump(mode="json"), "generator": generator}
    inputs: dict[str, dict[str, Any]] = {}
    for stage in TABLE:
        own: dict[str, Any] = {}
        for key in stage.settings:
            value: Any = values
            for part in key.split("."):
                value = value[part]
            if value is not None or key not in WHERE_GIVEN:
                own |= flatten({key: value})
        kept = {
            k: v
            for k, v in own.items()
            if (k == "generator" or changes_result(k)) and (v is not None or k not in WHERE_GIVEN)
        }
        inputs[stage.name] = {**(inputs[stage.needs] if stage.needs else {}), **kept}
    return inputs


def changed(
    before: dict[str, Any], now: dict[str, Any], told: dict[str, str] | None = None
) -> list[str]:
    """`generation.num_inference_steps: 4 -> 8`, for every input that differs.

    Settings that this version no longer has, or that do not change a result, do not count; one that
    the version before did not have yet had its default. The files of a set count where both know them.

    Args:
        told: what is said instead, by key.
    """
    both = before.keys() & now.keys()
    before = {k: v for k, v in before.items() if k == "generator" or k in both or changes_result(k)}
    return [
        (told or {}).get(key) or f"{key}: {_value(before, key)} -> {_value(now, key)}"
        for key in sorted({*before, *now})
        if _value(before, key) != _value(now, key) and (key in both or not key.startswith(FILES))
    ]


def _value(inputs: dict[str, Any], key: str) -> Any:
    return of_today(key, inputs[key]) if key in inputs else default_of(key)
