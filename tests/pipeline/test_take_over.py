"""Classes come and go: which meanings, scenes, seeds and images of an earlier run are kept."""

import itertools
import json
import logging
from pathlib import Path

import pytest
from samples import ROOT

from ray_synth.config import Config, load_config
from ray_synth.errors import UserError
from ray_synth.pipeline.run import Run, begin, check_run
from ray_synth.pipeline.sets import inspect_training
from ray_synth.pipeline.steps import resolve_meanings, write_plan
from ray_synth.pipeline.take_over import (
    CLASSES,
    KnownClass,
    known_classes,
    read_classes,
    settle_classes,
    taken_contexts,
    taken_counts,
    taken_meanings,
)
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.stages import stage_inputs

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
SCENE = {
    "contexts": [
        {"context": {"foreground": "", "background": "on a lawn", "lighting": "", "camera_angle": ""},
         "source": "llm"},
    ],
    "raw": [], "refused": 0,
}  # fmt: skip


NUMBERS = itertools.count()


class Writer:
    """A service that knows meanings and writes one scene, and remembers for whom."""

    def __init__(self, choices: dict[str, str] | None = None) -> None:
        self.choices = choices or {}
        self.resolved: list[str] = []
        self.asked: list[str] = []

    def resolve_all(self, images, *, seed, known, told):
        for name in [name for name, _ in images if name not in known]:
            self.resolved.append(name)
            yield {"class_name": name, "choice": self.choices[name], "num_refused": 0}

    def write_contexts_all(self, todo, *, seed):
        for name in todo:
            self.asked.append(name)
            yield name, SCENE


def digits(runs: Path, name: str, classes: dict[str, str], *more: str) -> Config:
    """Some digits by other names: {name: digit}."""
    mapping = json.dumps({digit: called for called, digit in classes.items()})
    sets = [f"data.{part}.class_map={mapping}" for part in ("train", "test", "ood.uci_digits")]
    return load_config(
        QUICKSTART,
        [f"runs_dir={runs}", f"name={name}", f"data.class_names={json.dumps(list(classes))}", *sets,
         "data.train.images_per_class=3", "prompting.multiplier=4", *more],
    )  # fmt: skip


def begun(config: Config) -> Run:
    """A run whose real images are known."""
    run = check_run(config)
    begin(run)
    given = run.config, run.sets, run.records, run.folder
    run.records.run("data", lambda: inspect_training(*given))
    return run


def finish(run: Run, choices: dict[str, str], service: Writer) -> Run:
    """With meanings and a plan."""
    service.choices = choices
    run.records.run("meaning", lambda: resolve_meanings(run, service))
    run.records.run("plan", lambda: write_plan(run, service))
    return run


CHOICES = {"one": "the number 1", "six": "the number 6", "two": "the number 2"}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Run:
    """A run of "one", "six" and "two", planned."""
    runs = tmp_path_factory.mktemp("runs")
    run = begun(digits(runs, "earlier", {name: name for name in CHOICES}))
    return finish(run, CHOICES, Writer())


@pytest.fixture
def runs(earlier) -> Path:
    """Where the runs are: each test has others beside the earlier one."""
    return Path(earlier.runs.uri)


def rows_of(run: Run) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in PlanFile(run.folder).rows(0, len(PlanFile(run.folder))):
        found.setdefault(row["class_name"], set()).add(row["sample_id"])
    return found


def later(runs: Path, classes: dict[str, str], *more: str) -> Config:
    return digits(
        runs, f"later-{next(NUMBERS)}", classes, f"take_over.run={runs / 'earlier'}", *more
    )


def test_a_class_that_came_and_one_that_went_leave_all_others_as_they_are(earlier, runs, caplog):
    before = rows_of(earlier)
    with caplog.at_level(logging.INFO, "ray_synth"):
        run = begun(later(runs, {"eight": "eight", "six": "six", "two": "two"}))
        taken = taken_meanings(run, {})
    assert "2 of 3 classes are those of" in caplog.text
    assert "new: eight; gone: one" in caplog.text
    assert {name: entry["choice"] for name, entry in taken.items()} == {
        "six": "the number 6", "two": "the number 2"
    }  # fmt: skip
    assert [(known.class_name, known.number, known.was) for known in read_classes(run.folder)] == [
        ("eight", 3, None), ("six", 1, "six"), ("two", 2, "two"),
    ]  # fmt: skip
    service = Writer()
    finish(run, {**CHOICES, "eight": "the number 8"}, service)
    assert service.resolved == ["eight"], "the language model is asked about it alone"
    assert service.asked == ["eight"], "and its scenes alone are written"
    after = rows_of(run)
    assert after["six"] == before["six"] and after["two"] == before["two"]
    assert not after["eight"] & set().union(*before.values())
    counts = taken_counts(run, {"taken": 24, "made": 12})
    assert counts["meanings"] == counts["contexts"] == {"taken": 2, "made": 1}


def test_a_renamed_class_keeps_what_it_has_and_prompts_call_it_as_before(earlier, runs):
    before = rows_of(earlier)
    classes = {"half a dozen": "six", "one": "one", "two": "two"}
    run = begun(later(runs, classes, "take_over.renamed={six: half a dozen}"))
    service = Writer()
    finish(run, {**CHOICES, "half a dozen": "?"}, service)
    assert service.resolved == service.asked == []
    entries = json.loads(run.folder.read_bytes("meanings.json"))
    assert (entries[0]["class_name"], entries[0]["choice"]) == ("half a dozen", "the number 6")
    assert rows_of(run) == {
        "half a dozen": before["six"], "one": before["one"], "two": before["two"]
    }  # fmt: skip
    # And once more: numbers and names outlive a second change.
    again = begun(
        digits(runs, "third", {"6": "six", "two": "two", "zero": "zero"},
               f"take_over.run={run.folder.uri}", "take_over.renamed={half a dozen: '6'}")
    )  # fmt: skip
    finish(again, {"6": "?", "two": "?", "zero": "the number 0"}, service)
    assert service.resolved == service.asked == ["zero"]
    third = rows_of(again)
    assert (third["6"], third["two"]) == (before["six"], before["two"])
    assert [known.number for known in known_classes(again)] == [1, 2, 3]


def test_parts_of_a_split_class_begin_anew_also_where_one_keeps_the_name(earlier, runs):
    before = rows_of(earlier)
    classes = {"nine": "nine", "one": "one", "six": "six", "two": "two"}
    run = begun(later(runs, classes, "take_over.split={six: [six, nine]}"))
    service = Writer()
    finish(run, {**CHOICES, "nine": "the number 9"}, service)
    assert service.resolved == service.asked == ["nine", "six"]
    after = rows_of(run)
    assert after["one"] == before["one"] and not after["six"] & before["six"]
    assert taken_counts(run, {})["meanings"] == {"taken": 2, "made": 2}


def test_meanings_of_other_settings_images_or_words_are_asked_anew(earlier, runs, caplog):
    names = {name: name for name in CHOICES}

    def taken(*more: str, told=None) -> set[str]:
        return set(taken_meanings(begun(later(runs, names, *more)), told or {}))

    assert taken() == set(names)
    assert taken("prompting.multiplier=8", "training.steps=9") == set(names)
    assert taken(told={"six": {"synonyms": ["6"], "parent": None}}) == {"one", "two"}
    numbers = "data.train.images_per_class={one: 3, six: 2, two: 3}"
    assert taken(numbers) == {"one", "two"}
    with caplog.at_level(logging.WARNING, "ray_synth"):
        assert taken("meaning.num_meanings=9") == set()
    assert "all meanings are resolved anew: meaning.num_meanings: 5 -> 9" in caplog.text


def test_scenes_follow_the_meaning_and_the_settings_that_wrote_them(earlier, runs):
    names = {name: name for name in CHOICES}
    run = begun(later(runs, names))
    settle_classes(run)
    assert set(taken_contexts(run, CHOICES)) == set(names)
    assert set(taken_contexts(run, {**CHOICES, "six": "half a dozen"})) == {"one", "two"}
    other = begun(later(runs, names, "prompting.contexts_per_class=4"))
    assert taken_contexts(other, CHOICES) == {}


@pytest.mark.parametrize(
    ("classes", "more", "says"),
    [
        ("one six", ["take_over.run=nowhere"], "no run with a finished plan"),
        ("one six", ["name=earlier"], "give this one a new name"),
        ("one six", ["take_over.renamed={sixx: six}"], "'sixx' is no class of the earlier run; .*'six'"),
        ("one six", ["take_over.renamed={two: sex}"], "'sex' is no class of data.train; .*'six'"),
        ("one six", ["take_over.split={two: [six, nine]}"], "'nine' is no class of data.train"),
        ("one nine", ["take_over.renamed={six: nine}", "take_over.split={six: [one, nine]}"],
         "'six' comes twice"),
        ("one nine", ["take_over.renamed={six: nine, two: nine}"], "'nine' comes twice"),
        ("one six", ["take_over.renamed={two: six}"], "'six' is a class of both runs"),
    ],
)  # fmt: skip
def test_what_is_asked_of_an_earlier_run_is_checked_first(earlier, runs, classes, more, says):
    config = later(runs, {name: name for name in classes.split()}, *more)
    with pytest.raises(UserError, match=says):
        check_run(config)


def test_images_that_were_checked_otherwise_are_refused(earlier, runs):
    earlier.records.run("quality", lambda: {})
    names = {name: name for name in CHOICES}
    check_run(later(runs, names))
    with pytest.raises(
        UserError, match=r"checked otherwise.*generation.checks.policy: flag -> reject"
    ):
        check_run(later(runs, names, "generation.checks.policy=reject"))


def test_a_run_without_it_has_the_inputs_that_it_had():
    inputs = stage_inputs(load_config(QUICKSTART), "g")
    assert not any("take_over" in key or "class_info" in key for key in inputs["evaluation"])
    given = load_config(
        QUICKSTART, ["take_over.run=runs/x", "data.class_info={six: {parent: number}}"]
    )
    inputs = stage_inputs(given, "g")
    assert inputs["plan"]["take_over.run"] == "runs/x"
    assert inputs["meaning"]["data.class_info.six.parent"] == "number"
    assert "take_over.run" not in inputs["data"]


def test_a_damaged_list_of_classes_is_named(earlier, runs):
    folder = earlier.folder.child("other")
    for wrong in (
        [{"class_name": "six"}],
        [1],
        [{"class_name": "six", "number": -1, "said": "six"}],
    ):
        folder.write_json(CLASSES, wrong)
        with pytest.raises(UserError, match="classes.json is damaged"):
            read_classes(folder)
    folder.write_json(CLASSES, [{"class_name": "six", "number": 4, "said": "6", "more": 1}])
    assert read_classes(folder) == [KnownClass("six", 4, "6")]
