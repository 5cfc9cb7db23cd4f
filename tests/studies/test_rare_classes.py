"""Rare classes of a long tail: groups, and what an arm changes for each."""

from types import SimpleNamespace

from ray_synth.studies.arm import Arm
from ray_synth.studies.rare_classes import frequency_groups, measure_by_frequency

COUNTS = {"a": 5, "b": 4, "c": 3, "d": 2, "e": 1, "f": 1, "g": 1, "h": 1, "i": 1}


def test_classes_are_in_thirds_and_those_of_equal_numbers_together():
    assert frequency_groups(COUNTS) == {
        "3 to 5 images": ["a", "b", "c"],
        "1 to 2 images": ["d", "e", "f"],
        "1 image": ["g", "h", "i"],
    }
    assert frequency_groups({"a": 9, **dict.fromkeys("bcdef", 1)}) == {
        "1 to 9 images": ["a", "b"],
        "1 image": ["c", "d", "e", "f"],
    }
    assert frequency_groups({"a": 7}) == {"7 images": ["a"]}


def test_changes_are_paired_by_seed_against_the_arm_that_is_named():
    real, whole = (
        Arm("tail_real", "real", 0, {}, "tail_real"),
        Arm("tail_whole", "whole", 6, {}, "tail_real"),
    )
    trials = [SimpleNamespace(arm=arm, seed=seed) for seed in (0, 1, 2) for arm in (real, whole)]

    def results(trial):
        first = {0: 10.0, 1: 50.0, 2: 90.0}[trial.seed] + (3.0 if trial.arm is whole else 0.0)
        by_class = {name: first + (20.0 if name in "abc" else 0.0) for name in COUNTS}
        return {"main": {"in_domain": {"by_class": by_class}}}

    run = SimpleNamespace(train=SimpleNamespace(counts=lambda: COUNTS))
    measured = SimpleNamespace(
        study=SimpleNamespace(arms=(Arm("real_5", "other", 0), real, whole)),
        grid=SimpleNamespace(trials=trials, results=results),
        run=lambda trial: run,
        figures={},
    )
    (table,) = measure_by_frequency(measured)
    assert table.head == (
        "arm", "3 to 5 images", "change", "1 to 2 images", "change", "1 image", "change"
    )  # fmt: skip
    assert [row[0] for row in table.rows] == ["real", "whole"]
    assert table.rows[0][2] == ""
    assert table.rows[1][1].startswith("73.0 ±")
    assert table.rows[1][2] == table.rows[1][6] == "+3.0 ± 0.0"
    assert measured.figures["by_frequency.tail_whole.1 image"] == 53.0
