"""DreamBooth-LoRA on the tiny and the embedded models: it learns, goes on, and can be used."""

from functools import partial

import numpy as np
import pipelines
import pytest
import torch
from pipelines import FAMILIES
from safetensors.torch import load_file
from test_store import plan_rows

from ray_synth.config import GenerationConfig
from ray_synth.data.digits import load_digits
from ray_synth.data.images import encode_array
from ray_synth.errors import UserError
from ray_synth.generators import tuning
from ray_synth.generators.diffusion import DiffusionGenerator
from ray_synth.generators.registry import check_generator
from ray_synth.generators.tuning import Tuning, check_tunable, tune
from ray_synth.storage.folder import Folder

LORA = "pytorch_lora_weights.safetensors"
config_of = partial(pipelines.config_of, guidance_scale=2.0)


@pytest.fixture
def images():
    """Sixes and sevens."""
    torch.set_num_threads(1)
    pixels, labels = load_digits("digits", "train")
    there = [at for at, label in enumerate(labels) if label in ("six", "seven")][:40]
    names = np.array([int(labels[at] == "seven") for at in there])
    return names, lambda places: [encode_array(pixels[there[at]]) for at in places]


PROMPTS = ["a photo of the number six", "a photo of the number seven"]


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_killed_tuning_goes_on_to_the_same_weights(name, images, tmp_path, monkeypatch):
    folder = FAMILIES[name](tmp_path / name)
    config, how = config_of(folder), Tuning(steps=6, batch_size=2, seed=3)
    monkeypatch.setattr(tuning, "KEEP_EVERY", 2)
    whole = Folder(tmp_path / "whole")
    told = tune(config, how, images, PROMPTS, whole)
    assert told["steps"] == 6 and all(np.isfinite(told["loss"]))
    labels, read = images
    left = iter(range(3))

    def until_killed(places):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return read(places)

    killed = Folder(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        tune(config, how, (labels, until_killed), PROMPTS, killed)
    assert not killed.exists(LORA)
    tune(config, how, images, PROMPTS, killed)
    one, other = (load_file(place.path(LORA)) for place in (whole, killed))
    assert one.keys() == other.keys() and any("lora_B" in key for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(value.any() for key, value in one.items() if "lora_B" in key)
    used = config_of(folder, adapters=[whole.address()])
    check_generator(used)
    rows = [{**plan_rows(1)[0], "prompt": PROMPTS[0], "negative_prompt": ""}]
    tuned, plain = (
        np.asarray(DiffusionGenerator(one).generate(rows)[0]).astype(int)
        for one in (used, config_of(folder))
    )
    assert (tuned != plain).any()


@pytest.mark.slow
def test_it_learns_what_it_is_shown(images, tmp_path):
    """The embedded model's loss on real digits, with the same noise before and after."""
    config = GenerationConfig(device="cpu", num_threads=1)
    how = Tuning(steps=20, batch_size=4, learning_rate=2e-3)
    check_tunable(config)
    tune(config, how, images, PROMPTS, Folder(tmp_path / "lora"))
    labels, read = images
    losses = []
    for adapters in ([], [str(tmp_path / "lora")]):
        now = GenerationConfig.model_validate({**config.model_dump(), "adapters": adapters})
        learner = tuning._Learner(tuning.filled(now), Tuning(learning_rate=1e-12), PROMPTS)
        noise = torch.Generator().manual_seed(0)
        batches = [list(range(at, at + 8)) for at in range(0, 40, 8)]
        losses.append(np.mean([learner.step(read(b), labels[b], noise) for b in batches]))
    assert losses[1] < 0.97 * losses[0], losses


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flux", "fine-tunes Stable Diffusion and SDXL, and .* is FluxPipeline"),
        ("lcm", "is LCM, distilled with guidance as an input: tune its teacher"),
    ],
)
def test_other_models_are_tuned_elsewhere(name, says, tmp_path):
    with pytest.raises(UserError, match=says):
        check_tunable(config_of(FAMILIES[name](tmp_path / name)))
    with pytest.raises(UserError, match="is glyphs: tune it with its own scripts"):
        check_tunable(GenerationConfig(generator="glyphs"))


def test_a_model_that_is_distilled_is_warned_of(caplog):
    check_tunable(GenerationConfig())
    assert "distilled to run in few steps, which tuning" in caplog.text
