"""One model of both BNs: how much of the auxiliary one, is chosen on images held out of training.

Validation images are like those that the main BN was trained on, and say nothing of others. So each
weight is also tried on corrupted copies of them (`corruption.py`), as bad as they come: the best one
there is taken of those that are no worse on the images themselves than training on real images alone.
Test images have no part in it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_synth.data.dataset import Index
from ray_synth.storage.folder import Folder

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5)  # of the auxiliary BN
SEVERITY = 5  # of 5
MOST = 2_000  # images, and corrupted copies
BATCH = 250
BASELINES = ("real_only", "recipe")
PREPARED_BY = ("image_size", "interpolation", "crop_pct")  # of a card: what decides the pixels


def few_of(index: Index) -> Index:
    """At most `MOST` images, evenly over the set."""
    places = np.linspace(0, len(index) - 1, min(MOST, len(index))).round().astype(int)
    return index.take(np.unique(places))


def write_blend(
    folder: Folder, rows: Sequence[dict[str, Any]], max_pixels: int
) -> dict[str, Any] | None:
    """Choose the weight, and write `models/mixed.blend.safetensors`; its card says how.

    Args:
        folder: the run's.
        rows: validation images, with `image`, `image_id` and `class_index`.

    Returns:
        The card's `blend`: `weight`, top-1 on the images (`clean`) and on corrupted copies, the same of
        each weight, of `main` and of the baseline. None for a model without BatchNorm.
    """
    import torch
    from safetensors.torch import load, save

    from ray_synth.device import pick_device
    from ray_synth.storage.classifiers import load_model
    from ray_synth.training.state_dicts import blend

    card = folder.read_json("models/mixed.json")
    if "aux" not in card["bns"]:
        return None
    device = pick_device("auto")
    if device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    sets = _prepared(rows, card, max_pixels)
    model = load_model(folder, "mixed", "main", card)
    main, aux = (
        load(folder.read_bytes(f"models/mixed.{bn}.safetensors")) for bn in ("main", "aux")
    )
    found = []
    for weight in WEIGHTS:
        model.load_state_dict(blend(model, main, aux, weight))
        found.append({"weight": weight, **_top1(model, sets, card, device)})
    base = next((arm for arm in BASELINES if folder.exists(f"models/{arm}.json")), None)
    least = None
    if base is not None:
        own = folder.read_json(f"models/{base}.json")
        alone = load_model(folder, base, "main", own)
        same = all(own[name] == card[name] for name in PREPARED_BY)
        sets = sets if same else _prepared(rows, own, max_pixels)
        least = _top1(alone, sets, own, device)
    chosen = choose(found, least)
    weights = blend(model, main, aux, chosen["weight"])
    data = save({key: value.contiguous() for key, value in weights.items()}, {"format": "pt"})
    folder.write_bytes("models/mixed.blend.safetensors", data)
    said = {**chosen, "images": len(rows), "main": found[0], "baseline": least, "tried": found}
    bns = [*(bn for bn in card["bns"] if bn != "blend"), "blend"]
    folder.write_json("models/mixed.json", {**card, "bns": bns, "blend": said})
    return said


def choose(found: Sequence[dict[str, float]], least: dict[str, float] | None) -> dict[str, float]:
    """The best on corrupted copies of those that are not below the baseline on the images themselves;
    of equals the one nearer to main, which is taken where there is none.

    Args:
        found: of each weight, main's first: `weight`, `clean` and `corrupted`.
        least: the baseline's; None: main's own.
    """
    bound = (found[0] if least is None else least)["clean"]
    fit = [item for item in found if item["clean"] >= bound] or [found[0]]
    return max(fit, key=lambda item: (item["corrupted"], -item["weight"]))


def _prepared(
    rows: Sequence[dict[str, Any]], card: dict[str, Any], max_pixels: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """(n, 3, size, size) uint8 and (n,) labels: of the images, and of their corrupted copies.

    Where all kinds of corruption of all images would be too many, each image has some of the kinds, in
    turn. An image that cannot be decoded is left out.
    """
    import torch

    from ray_synth.data.images import decode_image
    from ray_synth.errors import UserError
    from ray_synth.evaluation.corruption import STRENGTHS, corrupt
    from ray_synth.training.decoder import decode_all
    from ray_synth.training.model_files import card_transform

    kinds = [*STRENGTHS]
    each = max(1, min(len(kinds), MOST // max(len(rows), 1)))
    clean: list[tuple[bytes, int]] = []
    worse: list[tuple[bytes, int]] = []
    for place, row in enumerate(rows):
        try:
            image = decode_image(row["image"], max_pixels=max_pixels)
        except UserError:
            continue
        clean.append((row["image"], row["class_index"]))
        for turn in range(each):
            kind = kinds[(place * each + turn) % len(kinds)]
            file = io.BytesIO()
            corrupt(image, kind, SEVERITY, name=row["image_id"]).save(file, "PNG")
            worse.append((file.getvalue(), row["class_index"]))
    transform = card_transform(card)
    return {
        name: (
            decode_all([data for data, _ in items], [0] * len(items), transform, max_pixels)[0],
            torch.tensor([label for _, label in items]),
        )
        for name, items in (("clean", clean), ("corrupted", worse))
    }


def _top1(
    model: nn.Module, sets: dict[str, tuple[Tensor, Tensor]], card: dict[str, Any], device: str
) -> dict[str, float]:
    """Percent right of each set."""
    import torch

    from ray_synth.training.model_files import card_transform

    transform = card_transform(card)
    model = model.to(device).eval()
    right = {}
    for name, (images, labels) in sets.items():
        hits = 0
        with torch.inference_mode():
            for at in range(0, len(images), BATCH):
                logits = model(transform.batch(images[at : at + BATCH].to(device)))
                hits += int((logits.argmax(1).cpu() == labels[at : at + BATCH]).sum())
        right[name] = 100 * hits / max(len(labels), 1)
    return right
