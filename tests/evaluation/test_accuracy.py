"""Counts are exact, whatever the batches; intervals are Wilson's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, top_k_accuracy_score

from ray_synth.evaluation.accuracy import (
    BINS,
    Tally,
    add_shots,
    by_shots,
    interval,
    judge,
    paired_gain,
)


@given(st.integers(1, 60), st.integers(6, 12), st.integers(0, 10**6), st.integers(1, 20))
def test_counts_agree_with_scikit_learn_for_any_batches(rows, classes, seed, batch):
    rng = np.random.default_rng(seed)
    logits = rng.permutation(rows * classes).reshape(rows, classes).astype(np.float32)
    labels = rng.integers(classes, size=rows)
    tally = Tally(classes)
    for at in range(0, rows, batch):
        part = slice(at, at + batch)
        tally.add("m", "t", labels[part], judge(logits[part], labels[part]))
    found = tally.results([str(i) for i in range(classes)])[("m", "t")]
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, logits, k=k, labels=np.arange(classes))
        assert found[f"top{k}"] == pytest.approx(100 * expected)
    assert found["images"] == rows
    assert found["top1_interval"][0] <= found["top1"] <= found["top1_interval"][1]


def test_a_test_set_with_some_classes_chooses_among_those():
    logits = np.array([[9.0, 1.0, 2.0, 0.0, 0.0, 0.0]])
    assert not judge(logits, np.array([2]))[0, 0]
    top1, _, confidence, nll = judge(logits, np.array([2]), np.array([1, 2]))[0]
    assert top1
    assert confidence == pytest.approx(1 / (1 + np.exp(-1.0)))
    assert nll == pytest.approx(-np.log(confidence))


def test_ties_go_to_the_lower_index():
    assert judge(np.zeros((1, 9)), np.array([0]))[0, :2].tolist() == [True, True]
    assert judge(np.zeros((1, 9)), np.array([5]))[0, :2].tolist() == [False, False]


def test_the_interval_is_wilsons():
    # Wilson's interval for 8 of 10, as in Brown, Cai and DasGupta (2001), formula (4).
    assert interval(8, 10) == pytest.approx([49.02, 94.33], abs=0.01)
    assert interval(0, 10)[0] == 0
    assert interval(10, 10)[1] == 100


@given(st.integers(1, 200), st.integers(0, 10**6), st.integers(1, 50))
def test_calibration_is_the_gap_of_confidence_and_accuracy_in_bins(rows, seed, batch):
    rng = np.random.default_rng(seed)
    logits, labels = 3 * rng.normal(size=(rows, 4)), rng.integers(4, size=rows)
    tally = Tally(4)
    for at in range(0, rows, batch):
        part = slice(at, at + batch)
        tally.add("m", "t", labels[part], judge(logits[part], labels[part]))
    found = tally.results("abcd")[("m", "t")]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for low in np.arange(BINS) / BINS:
        mine = (confidence > low) & (confidence <= low + 1 / BINS)
        if mine.any():
            expected += abs(confidence[mine].mean() - right[mine].mean()) * mine.mean()
    assert found["ece"] == pytest.approx(100 * expected, abs=1e-9)
    assert found["nll"] == pytest.approx(log_loss(labels, probabilities, labels=range(4)))
    assert sum(entry["images"] for entry in found["calibration"]) == rows
    assert found["class_images"] == {
        name: int(n) for name, n in zip("abcd", np.bincount(labels, minlength=4), strict=True) if n
    }


def test_a_gain_is_paired_over_the_same_images():
    rng = np.random.default_rng(0)
    labels = rng.integers(6, size=500)
    good = np.eye(6)[labels] + 0.6 * rng.normal(size=(500, 6))
    bad = good + 0.3 * rng.normal(size=(500, 6))
    tally = Tally(6)
    verdicts = {"real_only": judge(bad, labels), "mixed.main": judge(good, labels)}
    tally.add_all("t", labels, verdicts)
    found = tally.results("abcdef")
    gain = found[("mixed.main", "t")]["gain"]
    expected = found[("mixed.main", "t")]["top1"] - found[("real_only", "t")]["top1"]
    assert gain["top1"] == pytest.approx(expected)
    assert gain["interval"][0] < expected < gain["interval"][1]
    assert "gain" not in found[("real_only", "t")]
    assert gain["over"] == "real_only" and "gain_over_recipe" not in found[("mixed.main", "t")]
    # Paired on the same images it is narrower than from two separate intervals.
    low, high = found[("mixed.main", "t")]["top1_interval"]
    assert gain["interval"][1] - gain["interval"][0] < 1.42 * (high - low)


def test_a_gain_names_its_baseline_and_both_are_counted():
    labels = np.arange(6).repeat(10)
    right = np.eye(6)[labels]
    wrong = np.roll(right, 1, axis=1)
    half = np.where(np.arange(60)[:, None] % 2, right, wrong)
    models = {"recipe": judge(half, labels), "mixed.main": judge(right, labels)}
    tally = Tally(6)
    tally.add_all("t", labels, models)
    gain = tally.results("abcdef")[("mixed.main", "t")]["gain"]
    assert (gain["top1"], gain["over"]) == (50.0, "recipe")
    both = Tally(6)
    both.add_all("t", labels, {**models, "real_only": judge(wrong, labels)})
    found = both.results("abcdef")
    assert found[("mixed.main", "t")]["gain"]["over"] == "real_only"
    assert found[("mixed.main", "t")]["gain"]["top1"] == 100.0
    assert found[("mixed.main", "t")]["gain_over_recipe"]["top1"] == 50.0
    for baseline in ("recipe", "real_only"):
        assert not [key for key in found[(baseline, "t")] if key.startswith("gain")]


def test_classes_are_told_by_how_many_training_images_they_have():
    counts = {"a": 1280, "b": 101, "c": 100, "d": 20, "e": 19, "f": 5}
    result = {
        "by_class": {"a": 90.0, "b": 70.0, "c": 60.0, "d": 40.0, "e": 20.0, "f": 0.0},
        "class_images": dict.fromkeys("abcdef", 50) | {"f": 150},
    }
    found = by_shots(result, counts)
    assert {group: (f["top1"], f["classes"]) for group, f in found.items()} == {
        "many": (80.0, 2), "medium": (50.0, 2), "few": (5.0, 2),
    }  # fmt: skip
    assert by_shots(result, dict.fromkeys("abcdef", 500)) == {}
    tree = {
        "real_only": {"in_domain": dict(result)},
        "mixed": {"main": {"ood": {"v2": dict(result)}}},
    }
    add_shots(tree, counts)
    assert tree["real_only"]["in_domain"]["shots"] == found
    assert tree["mixed"]["main"]["ood"]["v2"]["shots"] == found


def test_paired_intervals_and_p_values_are_the_published_ones():
    # McNemar's exact test of 15 against 5: twice the binomial tail P(X >= 15 | 20, 1/2).
    found = paired_gain(15, 5, 100)
    assert found["p_value"] == pytest.approx(0.0414, abs=1e-4)
    assert found["top1"] == 10
    assert found["interval"] == pytest.approx([0.99, 18.61], abs=0.01)  # by hand
    assert found["verdict"] == "gain"
    assert paired_gain(5, 15, 100)["verdict"] == "loss"
    assert paired_gain(0, 0, 10) == {
        "top1": 0.0,
        "interval": pytest.approx([-23.1, 23.1], abs=0.1),
        "p_value": 1.0,
        "verdict": "unclear",
    }
