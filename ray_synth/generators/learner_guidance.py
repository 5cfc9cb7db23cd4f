"""Guidance inside the sampler: images that are harder for a learner, by the gradient of its entropy.

In: a loaded diffusers pipeline, and a learner. Out: the same pipeline, whose predictions are changed at a
few steps while `applied` lasts. At such a step the predicted clean latents are decoded, the learner's
entropy of that picture is differentiated with respect to them, and the prediction is changed so that the
scheduler finds them shifted uphill. So every scheduler goes on as if its denoiser had said so, multistep
and consistency samplers too, and the denoiser itself is never differentiated.

After classifier guidance (Dhariwal and Nichol 2021, arXiv 2105.05233, section 4), with the entropy of the
learner in place of a class's probability (Askari-Hemmat et al. 2023, arXiv 2310.00158, and 2025,
Deliberate Practice, arXiv 2502.15588), and the gradient taken at the clean latents (He et al. 2023, MPGD,
arXiv 2311.16424).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray_synth.config import GenerationConfig, PracticeGuidanceConfig
from ray_synth.errors import UserError, shortened
from ray_synth.generators.learner import SteeringLearner, centre_rows
from ray_synth.generators.loading import find_scheduler

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("ray_synth")
# Pipelines that give one prediction a step to their scheduler, shaped as the latents that an
# AutoencoderKL decodes; their image-to-image twins do so too.
PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline",
    "LatentConsistencyModelPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline",
)  # fmt: skip
# How a scheduler's noisy latents are made of clean ones and noise. By its timestep, of constant variance:
BY_TIMESTEP = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler")
# by its sigmas, of constant variance as well;
CONSTANT = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
# clean + sigma x noise;
EXPLODING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
# (1 - sigma) x clean + sigma x noise.
FLOWING = ("FlowMatchEulerDiscreteScheduler",)
SCHEDULERS = (*BY_TIMESTEP, *CONSTANT, *EXPLODING, *FLOWING)
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
# A picture is decoded at this many times the learner's side at most: latents are reduced before.
DECODED = 2


def check_guidance(
    config: GenerationConfig, index: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> None:
    """What guidance needs of a pipeline, by its small files alone.

    Args:
        index: its model_index.json.
        scheduler: its scheduler's config, with the class that the config puts in its place.

    Raises:
        UserError: it is of a family, or has a scheduler, that cannot be guided; or is spread.
    """
    instead = "leave prompting.practice.guidance out (select works with any generator), or take "
    given = index.get("_class_name", "")
    name = str(given[-1] if isinstance(given, list | tuple) else given)
    decoder = str((index.get("vae") or [None, ""])[1])
    if name not in PIPELINES or decoder != "AutoencoderKL":
        raise UserError(
            f"prompting.practice.guidance: images of a {name} with {decoder or 'no autoencoder'} cannot "
            f"be guided by a learner; {instead}one of {', '.join(PIPELINES)} with AutoencoderKL"
        )
    kind = str(scheduler.get("_class_name", ""))
    if kind not in SCHEDULERS:
        raise UserError(
            f"prompting.practice.guidance: what a {kind} predicts of the clean image is not known; "
            f"{instead}for generation.scheduler one of {shortened(SCHEDULERS, len(SCHEDULERS))}"
        )
    settings = find_scheduler(kind).from_config(scheduler).config  # its class's own defaults, too
    clipped = [name for name in ("clip_sample", "thresholding") if settings.get(name)]
    if clipped or _prediction(kind, settings) not in PREDICTIONS:
        what = clipped[0] if clipped else f"prediction_type {settings.get('prediction_type')}"
        raise UserError(
            f"prompting.practice.guidance: {config.model!r} has a {kind} with {what}, which it does not "
            f"follow; {instead}another model"
        )
    if config.offload or config.num_gpus > 1:
        raise UserError(
            "prompting.practice.guidance needs the pipeline as a whole on one device: set "
            "generation.offload: false and num_gpus: 1 at most, or leave it out"
        )


class LearnerGuidance:
    """A pipeline that a learner guides while `applied` lasts, and that is untouched otherwise.

    The decoder that is differentiated is a frozen copy in float32: the pipeline's own keeps its weights'
    state, and half precision, in which some overflow, loses no gradient.

    Args:
        pipeline: of `check_guidance`, on its device.
        learner: on the same device.
    """

    def __init__(
        self, pipeline: Any, learner: SteeringLearner, config: PracticeGuidanceConfig
    ) -> None:
        self.pipeline, self.learner, self.config = pipeline, learner, config
        self.vae = _frozen_copy(pipeline.vae)
        self.pixels = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)  # to a latent

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Guide one call of the pipeline, the one inside the block."""
        scheduler = self.pipeline.scheduler
        own = scheduler.step
        done = [0, 0]  # the first step's place among the timesteps, and how many steps there were

        @functools.wraps(own)  # pipelines look at which arguments it takes
        def step(model_output: Any, timestep: Any, sample: Any, *more: Any, **others: Any) -> Any:
            if done[1] == 0:
                done[0] = (scheduler.timesteps == timestep).nonzero()[0].item()
            guided = guided_steps(len(scheduler.timesteps) - done[0], self.config.steps)
            if done[1] in guided:
                at = sum(done)
                model_output = self._guided(scheduler, at, timestep, model_output, sample)
            done[1] += 1
            return own(model_output, timestep, sample, *more, **others)

        scheduler.step = step
        try:
            with _exact_gradients():
                yield
        finally:
            del scheduler.step  # the method of its class again

    def _guided(
        self, scheduler: Any, at: int, timestep: Any, output: Tensor, sample: Tensor
    ) -> Tensor:
        """The prediction whose clean latents are those of `output`, shifted."""
        import torch

        assert output.shape == sample.shape, "the prediction is not of the latents' shape"
        of_sample, of_output = clean_weights(scheduler, at, timestep)
        with torch.inference_mode(mode=False):
            clean = of_sample * sample.float() + of_output * output.float()
            return (output.float() + self.shift(clean) / of_output).to(output.dtype)

    def shift(self, clean: Tensor) -> Tensor:
        """Where the learner is less sure: (n, channels, height, width) in latents.

        Its size is `scale` times that of an image's latents (root mean squares), less as the entropy
        nears the most that it can be; 0 where the gradient is no number.
        """
        import torch

        with torch.enable_grad():
            latents = clean.detach().clone().requires_grad_()
            entropy = self.learner.entropy(self.decoded(latents))
            (gradient,) = torch.autograd.grad(entropy.sum(), latents)
        length = _size(gradient)
        room = (1 - entropy.detach()).clamp(0, 1).view(-1, 1, 1, 1)
        found = self.config.scale * room * _size(clean) * gradient / length
        usable = torch.isfinite(found).flatten(1).all(dim=1).view(-1, 1, 1, 1) & (length > 0)
        if not bool(usable.all()):
            log.debug("%d images of a batch have no gradient to guide them", int((~usable).sum()))
        return torch.where(usable, found, torch.zeros_like(found))

    def decoded(self, latents: Tensor) -> Tensor:
        """(n, 3, height, width) in 0..1 of clean latents, not much larger than the learner sees it."""
        height, width = latents.shape[-2:]
        wanted = -(-DECODED * self.learner.side // self.pixels)
        if min(height, width) > wanted:
            rows, columns = (
                centre_rows(length, smaller, smaller, "bilinear", latents.device)
                for length in (height, width)
                for smaller in [length * wanted // min(height, width)]
            )
            latents = rows @ latents @ columns.T
        config = self.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                latents.new_tensor(config[name]).view(1, -1, 1, 1)
                for name in ("latents_mean", "latents_std")
            )
            latents = latents * std + mean * config["scaling_factor"]
        latents = latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
        return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def guided_steps(steps: int, share: float) -> set[int]:
    """Which of some steps are guided: a share of them, evenly spread; the last only where it is alone.

    What is changed at the last step is seen as it is, as a pattern that no denoiser has smoothed.
    """
    most = max(1, steps - 1)
    count = min(most, max(1, round(share * steps)))
    return {int((number + 0.5) * most / count) for number in range(count)}


def clean_weights(scheduler: Any, at: int, timestep: Any) -> tuple[float, float]:
    """The numbers (a, b) with which a scheduler's clean latents are a x sample + b x prediction.

    Args:
        at: which of the scheduler's timesteps it is.
        timestep: its value.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if kind in BY_TIMESTEP:
        kept = float(scheduler.alphas_cumprod[int(timestep)])
        alpha, sigma = kept**0.5, (1 - kept) ** 0.5
    else:
        sigma = float(scheduler.sigmas[at])
        if kind in EXPLODING:
            alpha = 1.0
        elif kind in FLOWING or config.get("use_flow_sigmas"):
            alpha = 1 - sigma
        else:
            alpha = 1 / (1 + sigma**2) ** 0.5
            sigma = alpha * sigma
    prediction = _prediction(kind, config)
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":  # of latents whose variance is 1 (Salimans and Ho 2022)
        variance = alpha**2 + sigma**2
        return alpha / variance, -sigma / variance**0.5
    if prediction == "flow_prediction":
        return 1.0, -sigma
    assert prediction == "sample", prediction
    return 0.0, 1.0


def _prediction(kind: str, config: Mapping[str, Any]) -> str:
    otherwise = "flow_prediction" if kind in FLOWING else "epsilon"
    return str(config.get("prediction_type") or otherwise)


def _size(latents: Tensor) -> Tensor:
    """(n, 1, 1, 1): the root mean square of each image's latents."""
    return latents.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def _frozen_copy(vae: Any) -> Any:
    """The autoencoder in float32, with plain attention: a fused one's gradient adds up in any order."""
    from diffusers.models.attention_processor import AttnProcessor

    copy = type(vae).from_config(vae.config)
    copy.load_state_dict(vae.state_dict())
    copy.set_attn_processor(AttnProcessor())
    return copy.to(vae.device).eval().requires_grad_(False)


@contextmanager
def _exact_gradients() -> Iterator[None]:
    """Convolutions whose gradients are the same each time, on a GPU."""
    import torch

    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
