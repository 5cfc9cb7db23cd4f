"""Stage `clip`: the image tower learns to agree with the frozen text tower.

This is locked-text tuning, the mirror of LiT (Zhai et al. 2022, arXiv 2111.07991).
In: pictures, captions, the text tower. Out: `work/clip`, an open_clip `local-dir:` model in fp16.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from jobs.embedded_models.clip_model import OPEN_CLIP_CONFIG, clip_model
from jobs.embedded_models.clock import Clock, step_down
from jobs.embedded_models.render import FIRST_DIGIT_LABEL, load_rendered
from jobs.embedded_models.settings import Settings, autocast

TEXT_BATCH = 4096
SAME_MEANING = 0.92  # captions at least this similar are not negatives of each other
MAX_SCALE = 60.0


def augment(pictures: torch.Tensor, may_flip: torch.Tensor) -> torch.Tensor:
    """Crops, mirrors and re-lights: `(n, 3, 64, 64)` in 0..1 to the same.

    Args:
        pictures: the batch.
        may_flip: `(n,) bool`; a mirrored digit is another sign.
    """
    count, device = len(pictures), pictures.device

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=device)

    flip = (uniform(count) < 0.5) & may_flip
    pictures = torch.where(flip[:, None, None, None], pictures.flip(-1), pictures)
    scale = 1 - uniform(count) * 0.45
    affine = torch.zeros(count, 2, 3, device=device)
    affine[:, 0, 0] = scale
    affine[:, 1, 1] = scale * (1 + (uniform(count) - 0.5) * 0.2)
    affine[:, :, 2] = (uniform(count, 2) * 2 - 1) * (1.05 - scale)[:, None]
    grid = functional.affine_grid(affine, list(pictures.shape), align_corners=False)
    pictures = functional.grid_sample(
        pictures, grid, padding_mode="reflection", align_corners=False
    )
    contrast = 1 + (uniform(count, 1, 1, 1) - 0.5) * 0.5
    return pictures * contrast + (uniform(count, 1, 1, 1) - 0.5) * 0.2


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, scale: Any) -> torch.Tensor:
    """CLIP's loss in both directions; captions of the same meaning share the target.

    Args:
        images: `(n, 384)` normalised.
        texts: `(n, 384)` normalised.
        scale: the inverse temperature.
    """
    logits = scale * images @ texts.T
    same = (texts @ texts.T > SAME_MEANING).float()
    target = same / same.sum(-1, keepdim=True)
    by_image = -(target * logits.log_softmax(-1)).sum(-1).mean()
    by_text = -(target * logits.T.log_softmax(-1)).sum(-1).mean()
    return (by_image + by_text) / 2


@torch.no_grad()
def caption_embeddings(model: Any, ids: torch.Tensor, device: str) -> torch.Tensor:
    """Normalised embeddings of both captions of every picture: `(n, 2, 384) float16`."""
    parts = []
    with autocast(device):
        for part in ids.flatten(0, 1).split(TEXT_BATCH):
            embedding = model.encode_text(part.long()).float()
            parts.append(functional.normalize(embedding, dim=-1).half())
    return torch.cat(parts).unflatten(0, (len(ids), 2))


def train_clip(settings: Settings) -> Path:
    """Trains the image tower; returns `work/clip`."""
    from safetensors.torch import load_file, save_file

    device = settings.device
    pictures, ids, labels = (
        load_rendered(settings, name) for name in ("pictures", "captions", "labels")
    )
    torch.manual_seed(0)
    model = clip_model()
    text_weights = load_file(settings.output_of("text", "text.safetensors"))
    result = model.load_state_dict(text_weights, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    model = model.to(device).requires_grad_(False)
    texts = caption_embeddings(model, ids, device)

    model.visual.requires_grad_(True).to(memory_format=torch.channels_last)
    model.logit_scale.requires_grad_(True).data.fill_(math.log(1 / 0.07))
    parameters = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05, betas=(0.9, 0.95))
    image_tower = torch.compile(model.visual) if settings.compiles else model.visual
    batch, clock = settings.batch(1024, 16), Clock("clip", settings)
    for _ in clock.steps():
        clock.set_learning_rate(optimizer, peak=2e-3, warmup=0.06)
        rows = torch.randint(0, len(pictures), (batch,), device=device)
        seen = pictures[rows].permute(0, 3, 1, 2).float() / 255
        seen = (augment(seen, labels[rows] < FIRST_DIGIT_LABEL) - 0.5) / 0.25
        text = texts[rows, torch.randint(0, 2, (batch,), device=device)].float()
        with autocast(device):
            image = image_tower(seen.contiguous(memory_format=torch.channels_last))
        image = functional.normalize(image.float(), dim=-1)
        scale = model.logit_scale.exp().clamp(max=MAX_SCALE)
        loss = contrastive_loss(image, text, scale)
        step_down(loss, optimizer, parameters)
        clock.log(loss=loss, scale=scale)

    folder = settings.work / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    config = json.dumps(OPEN_CLIP_CONFIG, indent=1)
    (folder / "open_clip_config.json").write_text(config, encoding="utf-8")
    return folder
