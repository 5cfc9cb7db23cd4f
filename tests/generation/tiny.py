"""The embedded generator as small as it can be: real images, in a moment."""

from ray_synth.config import GenerationConfig, QualityConfig


def embedded(**changes) -> GenerationConfig:
    return GenerationConfig(
        **{
            "model": "embedded",
            "width": 32,
            "height": 32,
            "num_inference_steps": 1,
            "guidance_scale": 1.0,
            "batch_size": 4,
            "num_cpus": 0.5,
            "checks": QualityConfig(policy="off"),
            **changes,
        }
    )
