"""The rule that ends rounds: how often it ends those that still gain, and whether it ends at all."""

import numpy as np

from ray_synth.evaluation.stopping import enough, gains


def simulated(rng: np.random.Generator, images: int, rounds: int, gain: float, churn: float):
    """Which images a learner has right after each round: its accuracy rises by `gain` (a share) each
    time, and besides, a share `churn` changes sides each way."""
    right = rng.random(images) < 0.5
    found = [right]
    for _ in range(rounds - 1):
        wins, losses = gain + churn, churn
        turns = rng.random(images)
        # of the wrong ones so many are won, of the right ones so many lost, that the sums are these
        won = ~right & (turns < wins / max(1e-9, (~right).mean()))
        lost = right & (turns < losses / max(1e-9, right.mean()))
        right = (right | won) & ~lost
        found.append(right)
    return found


def share_stopped(images: int, gain: float, least: float, rounds: int = 8, runs: int = 60) -> float:
    """The share of runs that the rule would end before their last round."""
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(runs):
        rights = simulated(rng, images, rounds, gain, churn=0.02)
        stopped += any(enough(rights[: seen + 1], least) for seen in range(rounds - 1))
    return stopped / runs


def test_rounds_that_gain_are_hardly_ever_ended():
    """Each of 8 rounds gains just the point that is asked for."""
    for images in (500, 5_000):
        assert share_stopped(images, gain=0.01, least=1.0) <= 0.02


def test_rounds_that_gain_nothing_are_ended_where_there_is_enough_to_see_it():
    assert share_stopped(10_000, gain=0.0, least=1.0) >= 0.9


def test_few_validation_images_hardly_ever_end_a_run():
    assert share_stopped(100, gain=0.0, least=1.0) <= 0.02


def test_one_round_without_a_gain_is_not_enough():
    right = np.arange(5_000) % 2 == 0
    assert not enough([right], 1.0)
    assert not enough([right, right], 1.0)
    assert enough([right, right, right], 1.0)
    better = right.copy()
    better[1:2_000:2] = True
    assert not enough([right, right, better], 1.0)
    assert gains([right, better])[0]["top1"] == 20.0
