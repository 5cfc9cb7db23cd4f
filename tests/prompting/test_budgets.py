"""How many images each class gets: the same, its own multiplier, or what fills it up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_synth.config import PromptingConfig
from ray_synth.errors import UserError
from ray_synth.preflight.demands import Sizes
from ray_synth.prompting.budgets import class_budgets, filled_up

COUNTS = {"crane": 100, "heron": 10, "stork": 1}


def budgets(**settings):
    return class_budgets(PromptingConfig.model_validate(settings), COUNTS)


def test_each_class_gets_the_same_by_default():
    assert budgets(multiplier=2) is None


def test_classes_are_filled_up_to_a_number():
    assert budgets(fill_to=50).tolist() == [0, 40, 49]
    with pytest.raises(UserError, match=r"fill_to 1 leaves no image to make.*smallest 1"):
        budgets(fill_to=1)


def test_what_the_multiplier_gives_is_dealt_evenly():
    assert budgets(fill_to="even", multiplier=1.0).tolist() == [0, 51, 60]
    assert budgets(fill_to="even", multiplier=3.0).tolist() == [48, 138, 147]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 200))
def test_filling_up_is_as_even_as_it_can_be(real, total):
    real = np.array(real)
    found = filled_up(real, total)
    assert found.sum() == total
    assert (found >= 0).all()
    level = real + found
    assert level[found > 0].max() - level.min() <= 1, "none is lifted above one left behind"


def test_a_class_may_have_a_multiplier_of_its_own():
    assert budgets(multiplier=2, class_multipliers={"stork": 30}).tolist() == [110, 110, 30]
    assert budgets(multiplier=2, class_multipliers={"crane": 0}).tolist() == [0, 11, 11]
    with pytest.raises(UserError, match="'storck', which is no class; did you mean 'stork'"):
        budgets(class_multipliers={"storck": 3})
    with pytest.raises(ValueError, match="fill_to and class_multipliers: give one of them"):
        budgets(fill_to=3, class_multipliers={"stork": 3})


def test_the_number_of_images_is_known_before_anything_is_spent():
    from samples import ROOT

    from ray_synth.config import load_config

    def planned(*settings, counts=COUNTS):
        config = load_config(ROOT / "jobs/configs/quickstart.yaml", list(settings))
        return Sizes(111, 3, counts=counts).synthetic(config)

    assert planned("prompting.multiplier=2") == 222
    assert planned("prompting.fill_to=50") == 89
    assert planned("prompting.fill_to=even", "prompting.multiplier=2") == 222
    assert planned("prompting.fill_to=50", counts=None) is None
