"""Noise belongs to (seed, step, token), and what is drawn with it follows the model's probabilities."""

import math

import pytest
import torch
from scipy.stats import chisquare, kstest

from ray_synth.meaning.sampling import GOLDEN, TOP_K, _mix, _signed, gumbel_noise, sampler


def test_noise_is_gumbel_and_independent_over_seeds_steps_and_tokens():
    seeds = torch.arange(40) + 7
    tokens = torch.arange(50).expand(40, 50) + 150_000
    noise = torch.stack([gumbel_noise(seeds, step, tokens) for step in range(30)])
    assert noise.isfinite().all() and noise.dtype == torch.float32
    assert kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.001
    for axis in range(3):  # neighbours in each direction say nothing of each other
        near, far = noise.narrow(axis, 0, 29).flatten(), noise.narrow(axis, 1, 29).flatten()
        correlation = torch.corrcoef(torch.stack([near, far]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(near.numel())


def test_noise_of_a_token_does_not_depend_on_what_is_asked_beside_it():
    tokens = torch.tensor([[5, 9, 11], [9, 5, 2]])
    together = gumbel_noise(torch.tensor([1, 2]), 3, tokens)
    assert gumbel_noise(torch.tensor([2]), 3, tokens[1:].flip(1)).flip(1).equal(together[1:])
    # the same figures for ever, on every device: seeds are kept in plans and caches
    expected = torch.tensor([[-0.6409, 1.6268, 1.3310], [-1.1079, -0.9174, 1.4956]])
    torch.testing.assert_close(together, expected, atol=1e-3, rtol=0)
    assert (
        int(_mix(torch.tensor(_signed(GOLDEN)))) % 2**64 == 0xE220A8397B1DCDAF
    )  # SplitMix64's first


def draws(scores: torch.Tensor, n: int, temperature: float = 1.0) -> torch.Tensor:
    drawn = sampler(list(range(n)), temperature)(torch.zeros(n, 1), scores.expand(n, -1))
    return drawn.argmax(1)


@pytest.mark.parametrize("temperature", [0.8, 1.5])
def test_tokens_are_drawn_as_often_as_the_model_says(temperature):
    scores = torch.tensor([[2.0, 1.0, 0.0, 0.5, -1.0]])
    counts = draws(scores, 20_000, temperature).bincount(minlength=5)
    expected = (scores[0] / temperature).softmax(0) * 20_000
    assert chisquare(counts.numpy(), expected.double().numpy(), sum_check=False).pvalue > 0.001


def test_only_the_likeliest_are_drawn_and_those_that_equal_the_last_of_them():
    scores = torch.zeros(1, 1000)
    scores[0, 100 : 100 + TOP_K - 2] = 0.5
    scores[0, 500:510] = 0.25  # ten that equal the 40th: which of them came first must not matter
    seen = draws(scores, 20_000, temperature=10).unique()
    assert seen.tolist() == [*range(100, 100 + TOP_K - 2), *range(500, 510)]


def test_half_precision_and_another_order_draw_the_same():
    torch.manual_seed(0)
    scores = torch.randn(8, 300).bfloat16()  # many ties
    process = sampler(list(range(8)), 0.8)
    one = process(torch.zeros(8, 1), scores)
    for rows in ([3], [7, 3, 0]):
        process = sampler(rows, 0.8)
        assert process(torch.zeros(len(rows), 1), scores[rows]).equal(one[rows])


def test_greedy_needs_no_noise():
    assert len(sampler([1], 0.0)) == 0
