"""Intervals and tests against scipy's and statsmodels-free closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ray_synth.studies.statistics import correlation, estimate, false_discovery_rates, paired

points = st.lists(
    st.floats(-50, 50).map(lambda x: round(x, 3)), min_size=2, max_size=8, unique=True
)


@given(points)
def test_the_interval_and_p_are_those_of_a_one_sample_t_test(values):
    found = estimate(values)
    expected = stats.ttest_1samp(values, 0)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half == pytest.approx((high - low) / 2)
    assert found.p == pytest.approx(expected.pvalue)


@given(points, st.floats(-5, 5))
def test_a_paired_change_is_a_paired_t_test_whatever_the_seeds_order(values, shift):
    noise = np.linspace(-0.3, 0.4, len(values))
    before = dict(enumerate(values))
    after = {seed: value + shift + noise[seed] for seed, value in reversed(before.items())}
    found = paired(after, before)
    expected = stats.ttest_rel([after[s] for s in before], [before[s] for s in before])
    assert found.mean == pytest.approx(shift + noise.mean(), abs=1e-9)
    assert found.p == pytest.approx(expected.pvalue, abs=1e-6)


def test_pairing_uses_the_seeds_that_both_have():
    assert paired({0: 5.0, 1: 7.0, 2: 100.0}, {0: 4.0, 1: 5.0}).mean == pytest.approx(1.5)
    with pytest.raises(ValueError, match="no seed in common"):
        paired({0: 1.0}, {1: 1.0})


def test_one_seed_has_no_interval_and_says_so():
    found = estimate([3.25])
    assert math.isnan(found.half) and math.isnan(found.p)
    assert found.shown(signed=True) == "+3.2"
    assert estimate([1.0, 2.0, 3.0]).shown() == "2.0 ± 2.5"


def test_equal_values_have_no_doubt():
    assert estimate([2.0, 2.0]).p == 0.0
    assert estimate([0.0, 0.0]).p == 1.0


def test_false_discovery_rates_are_benjamini_and_hochbergs_and_leave_gaps():
    # by hand: sorted p 0.01, 0.02, 0.04 of three tests -> 0.03, 0.03, 0.04
    found = false_discovery_rates([0.04, float("nan"), 0.01, 0.02])
    assert found[0] == pytest.approx(0.04) and math.isnan(found[1])
    assert found[2:] == pytest.approx([0.03, 0.03])


def test_correlation_is_of_ranks_and_needs_three_pairs():
    assert correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert math.isnan(correlation([1, 2], [2, 1]))
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3]))
