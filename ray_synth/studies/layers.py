"""Real against synthetic images in a classifier's BatchNorm layers, before and after they have their own.

`layer_rows` is the body of a Ray task: models and images in, one row per layer out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from ray_synth.data.dataset import Index, read_index
from ray_synth.errors import UserError
from ray_synth.storage.folder import Folder
from ray_synth.studies.measures import Measured
from ray_synth.studies.plots import COLOURS, MARKERS
from ray_synth.studies.results import Table

log = logging.getLogger("ray_synth")

BATCH = 128
MOST = 1024  # images of a domain


def layer_rows(
    arms: Folder,
    digest: str,
    bns: tuple[str, str],
    real: Index,
    synthetic: list[bytes],
    max_pixels: int,
) -> list[dict[str, Any]]:
    """How far what arrives at each BN layer is apart, by layer in forward order.

    Args:
        arms: the folder of trained models.
        digest: the model.
        bns: which export real images go through, and which synthetic ones: ("main", "main") is one
            network for both, ("main", "aux") each domain's own.
        real: held-out real images.
        synthetic: encoded images.
    """
    from ray_synth.evaluation.domain_shift import bn_statistics, statistics_distance
    from ray_synth.storage.classifiers import load_model

    card = arms.read_json(f"models/{digest}.json")
    given = (row["image"] for row in read_index(real))
    found = [
        bn_statistics(load_model(arms, digest, bn, card), _batches(card, images, max_pixels))
        for bn, images in zip(bns, (given, iter(synthetic)), strict=True)
    ]
    return [
        {"layer": s.layer, "channels": s.channels, "mean": s.mean, "spread": s.spread}
        for s in statistics_distance(*found)
    ]


def _batches(card: dict[str, Any], images: Iterator[bytes], max_pixels: int) -> Iterator[Any]:
    """Batches as a test would see them."""
    from ray_synth.training.decoder import Decoder, Draw
    from ray_synth.training.model_files import card_transform

    transform = card_transform(card)
    decoder = Decoder(transform, max_pixels)
    rows = ({"image": image, "class_index": 0} for image in islice(images, MOST))
    items = (item for row in rows if (item := decoder.keep(row)) is not None)
    while batch := list(islice(items, BATCH)):
        yield transform.batch(decoder.batch(Draw(batch, 0)).images)


def measure_layers(measured: Measured) -> list[Table]:
    """BN layers' inputs: one network for both domains, and each domain through its own BN."""
    import ray

    lines = (
        ("shared BN", "no_aux_bn", ("main", "main")),
        ("dual BN, both through main", "whole", ("main", "main")),
        ("dual BN, each through its own", "whole", ("main", "aux")),
    )
    arms = {arm.name: trials for arm, trials in measured.mixed()}
    compute = ray.remote(num_cpus=1)(layer_rows)
    curves: dict[str, list[dict[str, Any]]] = {}
    for label, name, bns in lines:
        trial = arms[name][0]
        if "aux" in bns and "aux" not in measured.grid.card(trial)["bns"]:
            return []  # a model without BatchNorm
        run = measured.run(trial)
        made = measured.plan(trial, ["image"])["image"].to_pylist()
        try:
            curves[label] = ray.get(
                compute.remote(
                    measured.grid.arms, trial.digest, bns, run.validation, made,
                    run.config.data.max_pixels,
                )
            )  # fmt: skip
        except UserError as error:  # no BatchNorm layer at all
            log.warning("layers are not compared: %s", getattr(error, "cause", error))
            return []
    measured.figures["layers"] = curves
    depth = len(next(iter(curves.values())))
    rows = tuple(
        (
            str(at + 1),
            *(f"{curve[at][key]:.2f}" for curve in curves.values() for key in ("mean", "spread")),
        )
        for at in range(depth)
    )
    head = ("layer", *(f"{label}: {what}" for label in curves for what in ("means", "spreads")))
    note = (
        "Distance of synthetic from held-out real images at each BN layer's input, seed "
        f"{measured.grid.trials[0].seed}: of means in real standard deviations, of spreads as the log "
        "ratio of standard deviations (root mean square over channels)."
    )
    return [Table("Layers", head, rows, note)]


def layer_figure(curves: dict[str, list[dict[str, Any]]]) -> Any:
    """Both distances over depth, one line for each of `curves`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, label in (
        (panels[0], "mean", "distance of means (real standard deviations)"),
        (panels[1], "spread", "distance of spreads (log ratio)"),
    ):
        for number, (name, rows) in enumerate(curves.items()):
            panel.plot(
                range(1, len(rows) + 1), [row[key] for row in rows], label=name, markersize=4,
                color=COLOURS[number], marker=MARKERS[number],
            )  # fmt: skip
        panel.set(xlabel="BatchNorm layer, from the input", ylabel=label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return figure


__all__ = ["layer_figure", "layer_rows", "measure_layers"]
