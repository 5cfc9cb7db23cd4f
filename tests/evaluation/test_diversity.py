"""Diversity against closed forms, and against the same thing written out pair by pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from ray_synth.evaluation import diversity
from ray_synth.evaluation.diversity import (
    copies,
    coverage,
    density,
    pairwise_distance,
    prompt_diversity,
    vendi_score,
)

seeds = st.integers(0, 10**6)


def features(seed: int, rows: int, dim: int, *, spread: float = 1.0) -> np.ndarray:
    """Unit rows about one direction, as embeddings of a class's images are."""
    rng = np.random.default_rng(seed)
    found = spread * rng.normal(size=(rows, dim))
    found[:, 0] += 1
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@given(seeds, st.integers(2, 12), st.integers(1, 8))
def test_pairwise_distance_is_the_mean_over_all_pairs(seed, rows, dim):
    x = features(seed, rows, dim).astype(np.float64)
    apart = [1 - x[i] @ x[j] for i in range(rows) for j in range(i)]
    assert pairwise_distance(x) == pytest.approx(np.mean(apart), abs=1e-6)


def test_pairwise_distance_of_equal_orthogonal_and_opposite_rows():
    assert pairwise_distance(np.ones((4, 3))) == pytest.approx(0, abs=1e-12)
    assert pairwise_distance(np.eye(5)) == pytest.approx(1)
    assert pairwise_distance(np.array([[1.0, 0], [-3.0, 0]])) == pytest.approx(2)


@pytest.mark.parametrize("measure", [pairwise_distance, vendi_score])
def test_the_length_of_rows_does_not_count(measure):
    x = features(0, 9, 4)
    lengths = np.linspace(0.1, 30, 9)[:, None]
    assert measure(x * lengths) == pytest.approx(measure(x), rel=1e-6)


@pytest.mark.parametrize(("rows", "dim"), [(6, 6), (3, 7)])
def test_vendi_counts_images_that_have_nothing_in_common(rows, dim):
    assert vendi_score(np.eye(dim)[:rows]) == pytest.approx(rows)
    assert vendi_score(np.ones((rows, dim))) == pytest.approx(1)


def test_vendi_of_unequal_groups_is_the_effective_number_of_groups():
    x = np.repeat(np.eye(3), [8, 1, 1], axis=0)
    assert vendi_score(x) == pytest.approx(np.exp(-0.8 * np.log(0.8) - 0.2 * np.log(0.1)))


@given(seeds, st.integers(2, 12), st.integers(1, 12), st.integers(2, 4))
def test_vendi_is_the_entropy_of_the_similarity_matrix_and_copies_add_nothing(
    seed, rows, dim, times
):
    x = features(seed, rows, dim).astype(np.float64)
    shares = np.linalg.eigvalsh(x @ x.T / rows)
    shares = shares[shares > 1e-14]
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert vendi_score(x) == pytest.approx(expected, rel=1e-5)
    assert 1 <= vendi_score(x) <= min(rows, dim)
    # repeated rows turn the Gram matrix's case into the covariance's
    assert vendi_score(np.tile(x, (times, 1))) == pytest.approx(vendi_score(x), rel=1e-9)


@given(seeds, st.integers(4, 15), st.integers(2, 15), st.integers(1, 3))
def test_coverage_and_density_are_the_papers_formulas(seed, n, m, k):
    real, synthetic = features(seed, n, 3), features(seed + 1, m, 3, spread=0.5)
    own = np.sort(np.linalg.norm(real[:, None] - real[None].astype(np.float64), axis=2), axis=1)
    across = np.linalg.norm(real[:, None].astype(np.float64) - synthetic[None], axis=2)
    about = across < own[:, k, None]
    assert coverage(real, synthetic, k=k) == pytest.approx(about.any(axis=1).mean())
    assert density(real, synthetic, k=k) == pytest.approx(about.sum() / (k * m))


@pytest.mark.parametrize("k", [1, 5])
def test_identical_sets_cover_each_other_and_far_ones_do_not(k):
    real = features(0, 40, 16, spread=0.1)
    assert coverage(real, real, k=k) == 1
    assert density(real, real, k=k) == pytest.approx(1)
    assert coverage(real, -real, k=k) == density(real, -real, k=k) == 0


def test_rounding_makes_no_neighbours():
    real = features(0, 20, 7).astype(np.float64)
    copied = np.concatenate(
        [real, 3 * real, 0.7 * real]
    )  # each has two neighbours at a distance of 0
    assert coverage(copied, 1.7 * real, k=2) == 0
    assert coverage(copied, 1.7 * real, k=3) == 1


def test_new_draws_cover_as_the_paper_expects_and_one_image_again_and_again_does_not():
    real, new = features(0, 800, 6), features(1, 800, 6)
    assert coverage(real, new, k=3) == pytest.approx(1 - 2**-3, abs=0.04)
    assert density(real, new, k=3) == pytest.approx(1, abs=0.1)
    centre = np.tile(real.mean(axis=0), (800, 1))
    assert coverage(real, centre, k=3) < 0.1


def test_blocks_do_not_change_the_result(monkeypatch):
    real, synthetic = features(0, 30, 5), features(1, 41, 5)
    whole = coverage(real, synthetic), density(real, synthetic), copies(real, synthetic)
    monkeypatch.setattr(diversity, "BLOCK_ENTRIES", 100)
    found = coverage(real, synthetic), density(real, synthetic), copies(real, synthetic)
    assert found[:2] == whole[:2]
    assert found[2].share == whole[2].share
    assert [(p.synthetic, p.real) for p in found[2].pairs] == [
        (p.synthetic, p.real) for p in whole[2].pairs
    ]


def test_copies_are_found_and_paired_with_their_originals():
    real, synthetic = features(0, 200, 16), features(1, 50, 16)
    synthetic[[7, 30]] = real[[123, 5]]
    synthetic[11] = real[60] + 1e-3 * real[61]  # nearly
    found = copies(real, synthetic, show=4)
    assert found.share == 3 / 50
    assert {(pair.synthetic, pair.real) for pair in found.pairs[:3]} == {
        (7, 123),
        (30, 5),
        (11, 60),
    }
    assert found.pairs[2].synthetic == 11
    distances = [pair.distance for pair in found.pairs]
    assert distances == sorted(distances)
    assert distances[2] < found.threshold < distances[3]
    # against another implementation
    own = NearestNeighbors(n_neighbors=2, metric="cosine").fit(real).kneighbors()[0][:, 0]
    assert found.threshold == pytest.approx(np.quantile(own, 0.01), abs=1e-6)


def test_copies_among_the_real_images_do_not_hide_those_among_the_synthetic():
    real = features(0, 100, 8)
    synthetic = features(1, 20, 8)
    synthetic[3] = real[0]
    expected = copies(real, synthetic)
    assert expected.share > 0
    found = copies(np.concatenate([real, real[:10]]), synthetic)  # 18% have a distance of 0
    assert found.share > 0
    assert found.threshold == pytest.approx(expected.threshold, rel=0.2)
    only_copies = copies(np.tile(real[:1], (5, 1)), synthetic[3:4])
    assert only_copies.share == 1


def test_new_images_are_called_copies_as_often_as_the_quantile_says():
    found = copies(features(0, 1500, 6), features(1, 1500, 6), quantile=0.1, show=0)
    assert found.share == pytest.approx(0.1, abs=0.025)
    assert found.pairs == ()


def test_prompts_are_counted_in_words():
    found = prompt_diversity(["A red cat, sleeping", "a  RED cat, sleeping", "the red dog"])
    # 11 words: a red cat sleeping the dog; pairs: a-red red-cat cat-sleeping the-red red-dog of 8
    assert (found.prompts, found.distinct) == (3, 2)
    assert found.distinct_1 == pytest.approx(6 / 11)
    assert found.distinct_2 == pytest.approx(5 / 8)
    assert found.mean_words == pytest.approx(11 / 3)


def test_a_hyphen_or_apostrophe_joins_a_word_and_pairs_stay_within_a_prompt():
    assert prompt_diversity(["black-and-white", "a dog's day"]).mean_words == 2
    assert prompt_diversity(["cat", "dog"]).distinct_2 == 0
    assert prompt_diversity(["one two", "three four"]).distinct_2 == 1  # not two-three


@given(st.lists(st.text(), max_size=6))
def test_prompt_measures_stay_in_range_for_any_text(prompts):
    found = prompt_diversity([*prompts, "word"])
    assert 1 <= found.distinct <= found.prompts == len(prompts) + 1
    assert 0 < found.distinct_1 <= 1
    assert 0 <= found.distinct_2 <= 1
    assert found.mean_words > 0


GOOD = features(0, 8, 4)
NAN = GOOD.copy()
NAN[5, 1] = np.nan
ZERO = GOOD.copy()
ZERO[2] = 0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (GOOD[:1], "at least 2 rows, but have 1"),
        (GOOD[0], r"shape \(4,\)"),
        (GOOD[:, :0], r"shape \(8, 0\)"),
        (NAN, "NaN or infinity in 1 of 8 rows, first in row 5"),
        (ZERO, "length 0, so no direction, in 1 of 8 rows, first in row 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_plain_words(bad, words):
    for measure in (pairwise_distance, vendi_score):
        with pytest.raises(ValueError, match=f"features .*{words}"):
            measure(bad)
    for compare in (coverage, density, copies):
        with pytest.raises(ValueError, match=f"real features .*{words}"):
            compare(bad, GOOD)
    for compare in (coverage, density):
        with pytest.raises(ValueError, match=f"synthetic features .*{words}"):
            compare(GOOD, bad)


def test_arguments_out_of_range_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="4 columns and synthetic ones 3"):
        coverage(GOOD, GOOD[:, :3])
    for k in (0, 8):
        with pytest.raises(ValueError, match=f"k is {k}, but 8 real images have from 1 to 7"):
            density(GOOD, GOOD, k=k)
    with pytest.raises(ValueError, match="quantile is 1.5"):
        copies(GOOD, GOOD, quantile=1.5)
    with pytest.raises(ValueError, match="show is -1"):
        copies(GOOD, GOOD, show=-1)
    with pytest.raises(ValueError, match="0 prompts without a word"):
        prompt_diversity([])


def test_half_precision_embeddings_give_nearly_the_same():
    x = features(3, 50, 32)
    for measure in (pairwise_distance, vendi_score):
        assert measure(x.astype(np.float16)) == pytest.approx(measure(x), rel=1e-3)
