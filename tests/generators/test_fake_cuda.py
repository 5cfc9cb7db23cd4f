"""The generator's path with tensors that only pretend to be on a GPU: what mixes CPU and CUDA raises.

Covered, by torch's FakeTensorMode: encoding prompts, noise, all denoising steps, decoding, and the pixels
up to their copy to the host, of the pipelines below. Not covered: numbers (a fake tensor has none),
memory, kernels, real images as references, and what reads a tensor's values: schedulers but Flux's (a
stand-in takes their place), the text encoders of Qwen-Image, Z-Image, Kandinsky 5 and Flux 2, and Lumina
2's denoiser.
"""

from operator import attrgetter

import pytest
import torch
from pipelines import FAMILIES, config_of
from test_store import plan_rows
from torch._subclasses.fake_tensor import FakeTensorMode

from ray_synth.generators.diffusion import DiffusionGenerator


class Straight:
    """A scheduler that reads no values: Euler steps along a straight path."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config):
        self.config = config

    def set_timesteps(self, num_inference_steps, device=None, **more):
        self.timesteps = torch.linspace(999, 1, num_inference_steps, device=device)

    def scale_model_input(self, sample, timestep):
        return sample

    def step(self, output, timestep, sample, **more):
        return (sample - output * (timestep / 1000).to(sample.dtype),)


def on_fake_cuda(generator):
    """The mode in which all weights of the generator are on a GPU that is not there."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parts = [p for p in generator.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    for module in (module for part in parts for module in part.modules()):
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is not None:
                    fake = mode.from_tensor(value.data)
                    with mode:
                        fake = fake.to("cuda")
                    kept[name] = torch.nn.Parameter(fake, requires_grad=False)
    generator.device = "cuda"
    return mode


def load(name, folder, **settings):
    config = config_of(FAMILIES[name](folder / name), guidance_scale=3.0, **settings)
    generator = DiffusionGenerator(config)
    if "flux" not in name:
        generator.pipeline.scheduler = Straight(generator.pipeline.scheduler.config)
    return generator


ROWS = [{**row, "negative_prompt": "red"} for row in plan_rows(2)]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart-sigma"])
def test_all_of_a_pipeline_runs_on_one_device(tmp_path, name):
    generator = load(name, tmp_path)
    with on_fake_cuda(generator), torch.inference_mode():
        images = generator.pipeline(**generator._arguments(ROWS))[0]
    assert images.device.type == "cuda"
    assert images.shape == (2, 3, 64, 64)


@pytest.mark.parametrize("left", ["text_encoder", "unet", "vae.decoder"])
def test_a_part_that_was_left_on_the_cpu_is_noticed(tmp_path, left):
    """So that the tests above can fail."""
    generator = load("sd15", tmp_path)
    mode = on_fake_cuda(generator)
    part = attrgetter(left)(generator.pipeline)
    module = next(m for m in part.modules() if m._parameters.get("bias") is not None)
    with mode:
        bias = module._parameters["bias"].cpu()
    module._parameters["bias"] = torch.nn.Parameter(bias, requires_grad=False)
    with mode, torch.inference_mode(), pytest.raises(RuntimeError, match="on the same device"):
        generator.pipeline(**generator._arguments(ROWS))
