"""Counts are exact, whatever the batches; intervals are Wilson's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from ray_synth.evaluation.accuracy import Tally, hits, interval


@given(st.integers(1, 60), st.integers(6, 12), st.integers(0, 10**6), st.integers(1, 20))
def test_counts_agree_with_scikit_learn_for_any_batches(rows, classes, seed, batch):
    rng = np.random.default_rng(seed)
    logits = rng.permutation(rows * classes).reshape(rows, classes).astype(np.float32)
    labels = rng.integers(classes, size=rows)
    tally = Tally(classes)
    for at in range(0, rows, batch):
        part = slice(at, at + batch)
        tally.add("m", "t", labels[part], hits(logits[part], labels[part]))
    found = tally.results([str(i) for i in range(classes)])[("m", "t")]
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, logits, k=k, labels=np.arange(classes))
        assert found[f"top{k}"] == pytest.approx(100 * expected)
    assert found["images"] == rows
    assert found["top1_interval"][0] <= found["top1"] <= found["top1_interval"][1]


def test_a_test_set_with_some_classes_chooses_among_those():
    logits = np.array([[9.0, 1.0, 2.0, 0.0, 0.0, 0.0]])
    assert not hits(logits, np.array([2]))[0, 0]
    assert hits(logits, np.array([2]), np.array([1, 2]))[0, 0]


def test_ties_go_to_the_lower_index():
    assert hits(np.zeros((1, 9)), np.array([0])).tolist() == [[True, True]]
    assert hits(np.zeros((1, 9)), np.array([5])).tolist() == [[False, False]]


def test_the_interval_is_wilsons():
    # Wilson's interval for 8 of 10, as in Brown, Cai and DasGupta (2001), formula (4).
    assert interval(8, 10) == pytest.approx([49.02, 94.33], abs=0.01)
    assert interval(0, 10)[0] == 0
    assert interval(10, 10)[1] == 100
