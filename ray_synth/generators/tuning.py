"""DreamBooth-LoRA: a Stable Diffusion or SDXL model fine-tuned on real images, as diffusers' scripts do.

In: the generation section, real images with a prompt for each class. Out: a LoRA for
`generation.adapters`.
The method is "diversify, don't fine-tune"; this makes the other side of that comparison.

Every step draws its images and its noise by its own number, so that a tuning that was killed goes on from
its last checkpoint to the same weights.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_synth.config import GenerationConfig
from ray_synth.data.images import decode_image
from ray_synth.device import pick_device
from ray_synth.errors import UserError
from ray_synth.generators.adapter_files import FILES
from ray_synth.generators.adapters import require_peft, wear
from ray_synth.generators.image_to_image import prepare_references
from ray_synth.generators.loading import load_pipeline, read_index
from ray_synth.generators.prompt_encoder import PromptEncoder
from ray_synth.generators.settings import family_of, filled
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
LAYERS = ["to_k", "to_q", "to_v", "to_out.0"]  # the UNet's attention, as in diffusers' scripts
STATE = "state.safetensors"
KEEP_EVERY = 100  # steps


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned; the defaults are those of diffusers' script for DreamBooth with LoRA, and
    `steps` ours.

    Attributes:
        rank: of the LoRA.
        batch_size: images per step.
    """

    steps: int = 500
    rank: int = 4
    learning_rate: float = 5e-4
    batch_size: int = 4
    seed: int = 0

    def digest_of(self) -> dict[str, Any]:
        return asdict(self)


def check_tunable(config: GenerationConfig) -> None:
    """Look at the model's index alone.

    Raises:
        UserError: it is no Stable Diffusion or SDXL model, guidance is an input of its UNet, or peft is
            not installed.
    """
    require_peft()
    named = config.generator if config.generator != "diffusers" else None
    found = named or str(read_index(config).get("_class_name"))
    if found not in PIPELINES:
        raise UserError(
            f"ray-synth tune fine-tunes Stable Diffusion and SDXL, and {config.model!r} is {found}: "
            "tune it with its own scripts, and name the LoRA in generation.adapters"
        )
    family = family_of(config)
    if family.name in ("LCM", "SDXL LCM"):
        raise UserError(
            f"{config.model!r} is {family.name}, distilled with guidance as an input: tune its teacher, "
            "and name the LoRA in generation.adapters"
        )
    if family.distilled:
        log.warning(
            "%s is distilled to run in few steps, which tuning by the usual loss may undo in part",
            family.name,
        )


def tune(
    config: GenerationConfig,
    tuning: Tuning,
    images: tuple[np.ndarray, Callable[[list[int]], list[bytes]]],
    prompts: Sequence[str],
    folder: Folder,
) -> dict[str, Any]:
    """Tune a model, and leave its LoRA in a folder.

    Args:
        images: (n,) class index of each real image, and what reads some of them by their places.
        prompts: of each class.
        folder: gets the LoRA, and while it is made what is needed to go on from it.

    Returns:
        `steps`, and the mean `loss` of the first and last tenth of those that were made now.

    Raises:
        UserError: the model cannot be tuned, or an image cannot be read.
    """
    import torch

    check_tunable(config)
    config = filled(config)
    learner = _Learner(config, tuning, prompts)
    labels, read = images
    losses: list[float] = []
    for step in range(learner.resume(folder), tuning.steps):
        random = np.random.default_rng([tuning.seed, step])
        places = random.integers(len(labels), size=tuning.batch_size).tolist()
        noise = torch.Generator("cpu").manual_seed(int(random.integers(2**62)))
        losses.append(learner.step(read(places), labels[places], noise))
        if (step + 1) % KEEP_EVERY == 0 or step + 1 == tuning.steps:
            learner.keep(folder, step + 1)
            log.info("tuned %d of %d steps: loss %.4f", step + 1, tuning.steps,
                     np.mean(losses[-KEEP_EVERY:]))  # fmt: skip
    learner.write(folder)
    tenth = max(1, len(losses) // 10)
    told = [float(np.mean(part)) for part in (losses[:tenth], losses[-tenth:]) if part]
    return {"steps": tuning.steps, "loss": told}


class _Learner:
    """A pipeline in float32 whose UNet has a LoRA that learns; on GPUs it computes in bfloat16."""

    def __init__(self, config: GenerationConfig, tuning: Tuning, prompts: Sequence[str]) -> None:
        import torch
        from diffusers import DDPMScheduler
        from peft import LoraConfig

        assert config.width is not None
        assert config.height is not None
        self.size = {"width": config.width, "height": config.height}
        self.device = pick_device(config.device)
        pipeline = load_pipeline(config, torch.float32)
        wear(pipeline, config, torch.float32)
        pipeline.to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.unet, self.vae = pipeline, pipeline.unet, pipeline.vae
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        self.texts = self._encoded(prompts)
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        torch.manual_seed(tuning.seed)  # the LoRA's first factors
        self.lora = LoraConfig(
            r=tuning.rank,
            lora_alpha=tuning.rank,
            init_lora_weights="gaussian",
            target_modules=LAYERS,
        )
        self.unet.add_adapter(self.lora, adapter_name="tuned")
        self.weights = {n: w for n, w in self.unet.named_parameters() if w.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=tuning.learning_rate, weight_decay=1e-2
        )

    def _encoded(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Embeddings of all classes' prompts, on the CPU: 1,000 of SDXL take 0.6 GB."""
        import torch

        encoder = PromptEncoder(self.pipeline, capacity=1)
        rows = [encoder.arguments([text], [""], 0.0) for text in prompts]
        if not encoder.caches:
            raise UserError("the text encoders of this model cannot be asked for a prompt alone")
        kept = [{k: v.cpu() for k, v in row.items() if k.endswith("embeds")} for row in rows]
        return {name: torch.cat([row[name] for row in kept]) for name in kept[0]}

    def step(self, images: Sequence[bytes], labels: np.ndarray, noise: Any) -> float:
        """One step of the optimizer; its loss."""
        import torch
        from torch.nn import functional

        pictures = prepare_references((decode_image(data) for data in images), **self.size)
        pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
        with torch.no_grad():
            seen = self.vae.encode(pixels.to(self.device).float() / 127.5 - 1).latent_dist
            latents = (seen.mean + seen.std * self._random(seen.mean, noise)) * (
                self.vae.config.scaling_factor
            )
        gauss = self._random(latents, noise)
        times = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(latents),), generator=noise
        ).to(self.device)
        noisy = self.scheduler.add_noise(latents, gauss, times)
        target = {
            "epsilon": lambda: gauss,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, gauss, times),
            "sample": lambda: latents,
        }[self.scheduler.config.prediction_type]()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.startswith("cuda")):
            found = self.unet(noisy, times, **self._conditions(labels), return_dict=False)[0]
        loss = functional.mse_loss(found.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _random(self, like: Any, noise: Any) -> Any:
        import torch

        return torch.randn(like.shape, generator=noise).to(like.device)

    def _conditions(self, labels: np.ndarray) -> dict[str, Any]:
        """What the UNet is told of a batch beside its noise."""
        import torch

        at = torch.from_numpy(np.asarray(labels))
        text = self.texts["prompt_embeds"][at].to(self.device)
        if "pooled_prompt_embeds" not in self.texts:
            return {"encoder_hidden_states": text}
        pooled = self.texts["pooled_prompt_embeds"][at].to(self.device)
        size = (self.size["height"], self.size["width"])
        of_size = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype=text.dtype, text_encoder_projection_dim=pooled.shape[-1]
        )
        added = {"text_embeds": pooled, "time_ids": of_size.repeat(len(at), 1).to(self.device)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}

    def keep(self, folder: Folder, step: int) -> None:
        """Write all that is needed to go on."""
        import torch
        from safetensors.torch import save

        state = {"step": torch.tensor(step)}
        for name, weights in self.weights.items():
            state[f"weights/{name}"] = weights.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}/{name}"] = self.optimizer.state[weights][moment]
        folder.write_bytes(STATE, save({n: v.cpu().contiguous() for n, v in state.items()}))

    def resume(self, folder: Folder) -> int:
        """The step to go on with: 0, or where a killed tuning was."""
        import torch
        from safetensors.torch import load

        if not folder.exists(STATE):
            return 0
        state = load(folder.read_bytes(STATE))
        step = int(state["step"])
        for name, weights in self.weights.items():
            with torch.no_grad():
                weights.copy_(state[f"weights/{name}"])
            self.optimizer.state[weights] = {
                "step": torch.tensor(float(step)),
                **{
                    moment: state[f"{moment}/{name}"].to(weights.device)
                    for moment in ("exp_avg", "exp_avg_sq")
                },
            }
        log.info("tuning goes on from step %d", step)
        return step

    def write(self, folder: Folder) -> None:
        """The LoRA, by the pipeline's own means."""
        from peft.utils import get_peft_model_state_dict

        # What its first factors were drawn by is of no concern to who loads it.
        header = {**self.lora.to_dict(), "init_lora_weights": True}
        with tempfile.TemporaryDirectory(prefix="ray-synth-") as there:
            type(self.pipeline).save_lora_weights(
                there,
                unet_lora_layers=get_peft_model_state_dict(self.unet, adapter_name="tuned"),
                unet_lora_adapter_metadata=header,
            )
            folder.write_bytes(FILES["lora"], Path(there, FILES["lora"]).read_bytes())
