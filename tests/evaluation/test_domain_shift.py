"""Distances between real and synthetic images against closed forms and other implementations."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ray_synth.evaluation import domain_shift
from ray_synth.evaluation.domain_shift import (
    batchnorm_layers,
    bn_statistics,
    cmmd,
    frechet_distance,
    probe_accuracy,
    statistics_distance,
)

seeds = st.integers(0, 10**6)


def drawn(seed: int, rows: int, dim: int, *, mean: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return mean + scale * np.random.default_rng(seed).normal(size=(rows, dim))


def with_moments(seed: int, rows: int, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Rows whose mean and unbiased covariance are exactly `mean` and rootᵀ root."""
    x = drawn(seed, rows, len(mean))
    x -= x.mean(axis=0)
    whiten = np.linalg.inv(np.linalg.cholesky(x.T @ x / (rows - 1))).T
    return x @ whiten @ root + mean


def test_frechet_of_gaussians_along_the_same_axes_is_the_closed_form():
    turn = np.linalg.qr(drawn(9, 3, 3))[0]
    deviations, others = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.1])
    means = np.array([0.0, 1.0, -2.0]), np.array([1.0, 1.0, 2.0])
    real = with_moments(0, 50, means[0], np.diag(deviations)) @ turn
    synthetic = with_moments(1, 70, means[1], np.diag(others)) @ turn
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations - others) ** 2).sum()
    assert frechet_distance(real, synthetic) == pytest.approx(expected, rel=1e-10)


@given(seeds, st.integers(2, 5))
def test_frechet_agrees_with_the_matrix_root_of_the_paper(seed, dim):
    real = drawn(seed, 40, dim) @ drawn(seed + 1, dim, dim)
    synthetic = drawn(seed + 2, 30, dim, mean=0.5) @ drawn(seed + 3, dim, dim)
    covariances = np.cov(real.T), np.cov(synthetic.T)
    root = sqrtm(covariances[0] @ covariances[1]).real
    gap = real.mean(axis=0) - synthetic.mean(axis=0)
    expected = gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(real, synthetic) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("rows", [4, 64, 200])  # fewer than, as many as, and more than dim
def test_frechet_of_identical_sets_is_0_and_of_moved_ones_the_squared_move(rows):
    x = drawn(0, rows, 64).astype(np.float32)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    moved = x.astype(np.float64) + 3.0
    assert frechet_distance(x, moved) == pytest.approx(9 * 64, rel=1e-9)
    assert frechet_distance(x, 2.0 * x) == pytest.approx(
        (x.mean(axis=0, dtype=np.float64) ** 2).sum() + x.var(axis=0, ddof=1, dtype=float).sum(),
        rel=1e-5,
    )


def test_frechet_of_fewer_images_than_dim_is_that_in_the_space_they_span():
    real, synthetic = drawn(0, 6, 3), drawn(1, 5, 3)
    basis = np.linalg.qr(drawn(2, 100, 3))[0].T  # into 100 dimensions, without a stretch
    assert frechet_distance(real @ basis, synthetic @ basis) == pytest.approx(
        frechet_distance(real, synthetic), rel=1e-9
    )


def naive_mmd(x: np.ndarray, y: np.ndarray, sigma: float, *, biased: bool) -> float:
    def mean_kernel(a, b, skip):
        values = [
            np.exp(-((a[i] - b[j]) ** 2).sum() / (2 * sigma**2))
            for i in range(len(a))
            for j in range(len(b))
            if not (skip and i == j)
        ]
        return np.mean(values)

    within = mean_kernel(x, x, not biased) + mean_kernel(y, y, not biased)
    return within - 2 * mean_kernel(x, y, False)


@given(seeds, st.integers(2, 9), st.integers(2, 9), st.booleans(), st.sampled_from([0.5, 10.0]))
def test_cmmd_is_its_formula_written_out(seed, n, m, biased, sigma):
    real, synthetic = drawn(seed, n, 4, mean=1), drawn(seed + 1, m, 4, mean=-0.5)
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (real, synthetic))
    found = cmmd(real, synthetic, bandwidth=sigma, biased=biased)
    assert found == pytest.approx(1000 * naive_mmd(x, y, sigma, biased=biased), abs=1e-9)
    assert not biased or found >= -1e-12


def test_cmmd_in_blocks_is_the_same(monkeypatch):
    real, synthetic = drawn(0, 23, 4), drawn(1, 31, 4, mean=1)
    whole = cmmd(real, synthetic)
    monkeypatch.setattr(domain_shift, "BLOCK", 7)
    assert cmmd(real, synthetic) == pytest.approx(whole, rel=1e-12)


def test_cmmd_is_0_in_the_mean_for_new_draws_and_only_if_unbiased():
    draws = [(drawn(2 * i, 10, 8), drawn(2 * i + 1, 10, 8)) for i in range(200)]
    plain = np.array([cmmd(*pair) for pair in draws])
    error = plain.std() / len(plain) ** 0.5
    assert abs(plain.mean()) < 4 * error
    assert plain.min() < 0
    assert np.mean([cmmd(*pair, biased=True) for pair in draws]) > 20 * error
    assert cmmd(draws[0][0], draws[0][0], biased=True) == pytest.approx(0, abs=1e-9)


def test_the_probe_cannot_tell_like_from_like():
    found = [probe_accuracy(drawn(i, 150, 8), drawn(50 + i, 150, 8), seed=0) for i in range(4)]
    assert np.mean(found) == pytest.approx(50, abs=5)


def test_the_probe_tells_a_shift_by_its_size():
    # an optimal rule is right with the probability Φ(shift / 2) along the one direction that matters
    real, synthetic = drawn(0, 600, 2), drawn(1, 600, 2)
    synthetic[:, 1] += 2
    assert probe_accuracy(real, synthetic, seed=0) == pytest.approx(84.1, abs=3)
    synthetic[:, 1] += 10
    assert probe_accuracy(real, synthetic, seed=0) == 100


def test_the_probe_weighs_both_sides_alike_and_scales_features():
    real, synthetic = drawn(0, 800, 3), drawn(1, 80, 3)
    assert probe_accuracy(real, synthetic, seed=0) == pytest.approx(50, abs=12)  # not 91
    synthetic[:, 0] += 2
    stretched = [rows * np.array([1e-4, 1e4, 1]) for rows in (real, synthetic)]
    found = probe_accuracy(*stretched, seed=0)
    assert found == pytest.approx(probe_accuracy(real, synthetic, seed=0), abs=0.5)
    assert found == pytest.approx(84.1, abs=4)  # 71 with a threshold that favours the many


def test_the_probe_depends_on_its_seed_alone():
    real, synthetic = drawn(0, 40, 5), drawn(1, 40, 5, mean=0.3)
    found = [probe_accuracy(real, synthetic, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


def small_model(name: str) -> nn.Module:
    """A timm model in eval mode whose BatchNorm layers all have statistics of their own."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def images(seed: int, count: int = 6, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])  # plain, and BatchNormAct2d
def test_bn_statistics_are_those_that_torch_would_run(name):
    model = small_model(name)
    batch = images(0)
    expected = {}

    def run(layer_name):
        def hook(layer, inputs):
            x = inputs[0]
            mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
            F.batch_norm(x, mean, var, training=True, momentum=1.0)
            values = x.numel() / x.shape[1]
            expected[layer_name] = (mean.numpy(), (var * (values - 1) / values).numpy())

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    handles = [m.register_forward_pre_hook(run(name)) for name, m in layers.items()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    found = bn_statistics(model, batch.split([1, 3, 2]))
    assert list(found) == list(expected)  # as called
    assert sorted(found) == sorted(batchnorm_layers(model))
    for layer, (mean, var) in found.items():
        assert mean.dtype == var.dtype == np.float64
        np.testing.assert_allclose(mean, expected[layer][0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(var, expected[layer][1], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.floats(0, 1e4))
def test_bn_statistics_are_exact_for_any_batches(seed, sizes, offset):
    torch.manual_seed(seed)
    x = offset + torch.randn(sum(sizes), 3, 2, 5, dtype=torch.float64)
    mean, var = bn_statistics(nn.BatchNorm2d(3).double().eval(), x.split(sizes))[""]
    flat = x.transpose(0, 1).reshape(3, -1).numpy()
    np.testing.assert_allclose(mean, flat.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(var, flat.var(axis=1), rtol=1e-7)


def test_bn_statistics_come_in_the_order_of_calls_and_gather_repeated_ones():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.never = (nn.BatchNorm1d(2) for _ in range(3))

        def forward(self, x):
            return self.last(self.first(self.first(x) * 0 + 10))

    model = Backwards().eval()
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = bn_statistics(model, [x])
    assert list(found) == ["first", "last"]
    np.testing.assert_allclose(found["first"][0], [6, 6.5])  # of 1, 3, 10, 10 and 2, 4, 10, 10
    assert batchnorm_layers(model) == ["last", "first", "never"]


def test_what_has_no_bn_statistics_is_refused():
    with pytest.raises(ValueError, match="Linear has no BatchNorm layer"):
        bn_statistics(nn.Linear(2, 2), [])
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    with pytest.raises(ValueError, match="no batch of images"):
        bn_statistics(model, [])
    with pytest.raises(ValueError, match="layer 1 have NaN"):
        bn_statistics(model, [images(0, 1, 4) * torch.nan])
    assert not model[1]._forward_pre_hooks
    model[1].train()
    with pytest.raises(ValueError, match="call model.eval"):
        bn_statistics(model, [images(0, 1, 4)])


def test_distances_of_statistics_are_the_closed_forms():
    real = {"a": (np.array([0.0, 1.0]), np.array([1.0, 4.0])), "b": (np.zeros(1), np.ones(1))}
    synthetic = {"b": (np.zeros(1), np.ones(1)), "a": (np.array([3.0, 1.0]), np.array([1.0, 1.0]))}
    first, second = statistics_distance(real, synthetic, eps=0)
    assert (first.layer, first.channels, second.layer, second.channels) == ("a", 2, "b", 1)
    assert first.mean == pytest.approx((9 / 2) ** 0.5)
    assert first.spread == pytest.approx(np.log(2) / 2**0.5)
    # channel 0: 9 / 2 both ways; channel 1: (4 - 1 - log 4) / 2 and (1 / 4 - 1 + log 4) / 2
    assert first.divergence == pytest.approx((9 / 2 + (3 + 0.25 - 1) / 4) / 2)
    assert (second.mean, second.spread, second.divergence) == (0, 0, 0)


@given(seeds, st.integers(1, 6))
def test_spread_and_divergence_are_the_same_both_ways_and_torchs(seed, channels):
    rng = np.random.default_rng(seed)
    sides = [
        {"layer": (rng.normal(size=channels), rng.uniform(0.01, 9, channels))} for _ in range(2)
    ]
    (there,), (back,) = statistics_distance(*sides), statistics_distance(*sides[::-1])
    assert there.spread == pytest.approx(back.spread)
    assert there.divergence == pytest.approx(back.divergence)
    p, q = (
        torch.distributions.Normal(torch.tensor(mean), torch.tensor(var + 1e-5).sqrt())
        for mean, var in (side["layer"] for side in sides)
    )
    kl = torch.distributions.kl_divergence
    assert there.divergence == pytest.approx(float((kl(p, q) + kl(q, p)).mean() / 2))


def test_a_shift_of_images_shows_in_the_first_layer_by_its_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    nn.init.zeros_(model[0].bias)
    real = bn_statistics(model, [images(0)])
    (same,) = statistics_distance(real, bn_statistics(model, [images(0)]))
    (wider,) = statistics_distance(real, bn_statistics(model, [2 * images(0)]))
    assert (same.mean, same.spread) == (0, 0)
    assert wider.spread == pytest.approx(np.log(2), abs=1e-3)


def test_channels_that_never_change_do_not_divide_by_0():
    real = {"layer": (np.zeros(2), np.zeros(2))}
    synthetic = {"layer": (np.zeros(2), np.array([0.0, 1.0]))}
    (found,) = statistics_distance(real, synthetic)
    assert np.isfinite([found.mean, found.spread, found.divergence]).all()


def test_statistics_of_different_models_are_refused():
    one, other = ({"norm": (np.zeros(n), np.ones(n))} for n in (2, 3))
    with pytest.raises(ValueError, match="2 channels for real images and 3 for synthetic"):
        statistics_distance(one, other)
    with pytest.raises(ValueError, match="only one side has statistics of the layers .*norm"):
        statistics_distance(one, {"nested.norm": one["norm"]})
    with pytest.raises(ValueError, match="no layers to compare"):
        statistics_distance({}, {})


GOOD = drawn(0, 8, 4)


@pytest.mark.parametrize("measure", [frechet_distance, cmmd, probe_accuracy])
def test_features_that_cannot_be_compared_are_refused(measure):
    def compare(real, synthetic):
        return (
            measure(real, synthetic, seed=0)
            if measure is probe_accuracy
            else measure(real, synthetic)
        )

    bad = GOOD.copy()
    bad[3, 0] = np.inf
    with pytest.raises(ValueError, match="synthetic features have NaN or infinity .* row 3"):
        compare(GOOD, bad)
    with pytest.raises(ValueError, match="real features need at least 2 rows, but have 1"):
        compare(GOOD[:1], GOOD)
    with pytest.raises(ValueError, match="4 columns and synthetic ones 2"):
        compare(GOOD, GOOD[:, :2])


def test_numbers_out_of_range_are_named():
    with pytest.raises(ValueError, match="8 real and 4 synthetic images are too few for 5 folds"):
        probe_accuracy(GOOD, GOOD[:4], seed=0)
    with pytest.raises(ValueError, match="folds is 1"):
        probe_accuracy(GOOD, GOOD, seed=0, folds=1)
    with pytest.raises(ValueError, match="bandwidth is 0"):
        cmmd(GOOD, GOOD, bandwidth=0)
