"""What studies measure beside accuracy, as tables: prompts, images, distances.

Features are CLIP's: of synthetic images as the store has them, of real images (training and validation,
never test) embedded once per source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_synth.data.dataset import Index, read_index
from ray_synth.errors import UserError
from ray_synth.evaluation import diversity, domain_shift
from ray_synth.meaning.answers import phrase_key
from ray_synth.meaning.comparison import Outcome, compare
from ray_synth.meaning.entries import read_meanings
from ray_synth.pipeline.run import Run
from ray_synth.studies.arm import Arm, Trial
from ray_synth.studies.design import Study
from ray_synth.studies.grid import Grid
from ray_synth.studies.results import IN_DOMAIN, Row, Table
from ray_synth.studies.statistics import correlation

NEIGHBOURS = 5
Measure = Callable[["Measured"], list[Table]]


@dataclass
class Measured:
    """A study whose trials were tested.

    Attributes:
        rows: of its accuracy.
        figures: further figures by name, for study.json and MLflow.
    """

    study: Study
    grid: Grid
    rows: Sequence[Row]
    figures: dict[str, Any] = field(default_factory=dict)
    _real: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    def mixed(self) -> list[tuple[Arm, list[Trial]]]:
        """The arms with synthetic images, each with its trials."""
        return [
            (arm, trials)
            for arm in self.study.arms
            if arm.scale and (trials := [t for t in self.grid.trials if t.arm.name == arm.name])
        ]

    def gain(self, arm: Arm) -> float:
        """Points in domain, with the main BN, over real images alone; NaN where it is not known."""
        for row in self.rows:
            if (row.arm.name, row.bn, row.test_set) == (arm.name, "main", IN_DOMAIN) and row.gain:
                return row.gain.mean
        return float("nan")

    def run(self, trial: Trial) -> Run:
        return self.grid.runs[trial.source]

    def plan(self, trial: Trial, columns: list[str]) -> Any:
        """Columns of the rows that the trial was trained on."""
        run = self.run(trial)
        planned = run.folder.read_rows("plan.parquet", 0, round(trial.arm.scale * len(run.train)))
        return run.store.table(planned["sample_id"], columns)

    def synthetic(self, trial: Trial) -> dict[str, np.ndarray]:
        """`features` (n, dim), `label` and `kind` of the trial's synthetic images.

        Raises:
            UserError: the images were not embedded.
        """
        table = self.plan(trial, ["class_index", "kind", "embedding"])
        if table["embedding"].null_count:
            raise UserError(
                "this study compares images by CLIP's features, which are kept where "
                "generation.checks has clip or label, and a policy other than off"
            )
        rows = np.stack([np.asarray(row, np.float32) for row in table["embedding"].to_pylist()])
        return {
            "features": rows,
            "label": table["class_index"].to_numpy(),
            "kind": np.array(table["kind"].to_pylist()),
        }

    def real(self, trial: Trial) -> dict[int, np.ndarray]:
        """(n, dim) features of the real images, training and validation, by class."""
        import ray

        run = self.run(trial)
        if trial.source not in self._real:
            clip = run.config.meaning.clip
            embed = ray.remote(num_cpus=clip.num_cpus, num_gpus=clip.num_gpus)(_embed)
            both = [run.train, run.validation]
            self._real[trial.source] = ray.get(embed.remote(both, clip, run.config.data.max_pixels))
        return self._real[trial.source]


def _embed(indices: list[Index], clip: Any, max_pixels: int) -> dict[int, np.ndarray]:
    """The task that embeds real images."""
    from ray_synth.data.images import decode_image
    from ray_synth.meaning.clip import load_clip

    pictures: dict[int, list[Any]] = {}
    for index in indices:
        for row in read_index(index):
            try:
                picture = decode_image(row["image"], max_pixels=max_pixels)
            except UserError:
                continue
            pictures.setdefault(row["class_index"], []).append(picture)
    model = load_clip(clip)
    return {label: model.encode_images(found) for label, found in sorted(pictures.items())}


def measure_distance(measured: Measured) -> list[Table]:
    """Fréchet distance, CMMD and a probe, real against synthetic, by arm; and what they explain."""
    names = ("Fréchet distance", "CMMD", "probe, %")
    found = {}
    for arm, trials in measured.mixed():
        values = []
        for trial in trials:
            real = np.concatenate(list(measured.real(trial).values()))
            made = measured.synthetic(trial)["features"]
            few = made[: len(real)]  # both measures depend on the number of images
            values.append(
                (
                    domain_shift.frechet_distance(real, few),
                    domain_shift.cmmd(real, few),
                    domain_shift.probe_accuracy(real, few, seed=0),
                )
            )
        found[arm] = np.array(values)
    note = (
        "CLIP features of real images (training and validation) against as many synthetic ones; the "
        "probe is the balanced accuracy of a linear classifier that tells them apart, 50 where it "
        "cannot. " + explained(measured, found, names)
    )
    return [_by_arm("Distance from the real images", found, names, measured, note, digits=3)]


def measure_diversity(measured: Measured) -> list[Table]:
    """Distances among images, Vendi score, coverage and copies by arm; by class and kind as well."""
    names = ("mean distance", "Vendi score", "coverage", "density", "near copies, %")
    found = {}
    for arm, trials in measured.mixed():
        values = []
        for trial in trials:
            made, real = measured.synthetic(trial), measured.real(trial)
            classes = [
                _class_diversity(made["features"][made["label"] == label], real[label])
                for label in real
                if (made["label"] == label).sum() > 1
            ]
            values.append(np.nanmean(classes, axis=0))
        found[arm] = np.array(values)
    note = (
        "Means over classes, CLIP features. Vendi score: effective number of different images of a "
        "class. Coverage: share of real images with a synthetic one nearer than their "
        f"{NEIGHBOURS}th real neighbour. Near copies: nearer to a real image than 1% of real images "
        "are to each other. " + explained(measured, found, names)
    )
    return [
        _by_arm("Diversity", found, names, measured, note, digits=3),
        *_by_class_and_kind(measured),
    ]


def _class_diversity(made: np.ndarray, real: np.ndarray) -> list[float]:
    enough = len(real) > NEIGHBOURS
    return [
        diversity.pairwise_distance(made),
        diversity.vendi_score(made),
        diversity.coverage(real, made, k=NEIGHBOURS) if enough else float("nan"),
        diversity.density(real, made, k=NEIGHBOURS) if enough else float("nan"),
        100 * diversity.copies(real, made).share if len(real) > 1 else float("nan"),
    ]


def _by_class_and_kind(measured: Measured) -> list[Table]:
    """Vendi score over the number of images, of the first seed of the arm with most kinds."""
    trials = {arm.name: trials[0] for arm, trials in measured.mixed()}
    if "whole" not in trials:
        return []
    trial = trials["whole"]
    made = measured.synthetic(trial)
    kinds = sorted(set(made["kind"].tolist()))
    names = measured.run(trial).train.class_names
    rows = []
    for label, name in enumerate(names):
        cells = [name]
        for kind in kinds:
            mine = made["features"][(made["label"] == label) & (made["kind"] == kind)]
            cells.append(
                f"{diversity.vendi_score(mine):.2f} of {len(mine)}" if len(mine) > 1 else ""
            )
        rows.append(tuple(cells))
    note = f"Vendi score and number of images, seed {trial.seed}."
    return [Table("Diversity by class and kind of prompt", ("class", *kinds), tuple(rows), note)]


def measure_prompts(measured: Measured) -> list[Table]:
    """How different the prompts are, by arm."""
    names = ("distinct prompts, %", "distinct words, %", "distinct pairs of words, %", "words")
    found = {}
    for arm, trials in measured.mixed():
        values = []
        for trial in trials:
            prompts = measured.plan(trial, ["prompt"])["prompt"].to_pylist()
            d = diversity.prompt_diversity(prompts)
            values.append(
                (100 * d.distinct / d.prompts, 100 * d.distinct_1, 100 * d.distinct_2, d.mean_words)
            )
        found[arm] = np.array(values)
    note = "Of a seed's prompts. " + explained(measured, found, names)
    return [_by_arm("Prompts", found, names, measured, note, digits=1)]


def measure_generation(measured: Measured) -> list[Table]:
    """Seconds of generation, by image and by gained point."""
    rows = []
    for arm, trials in measured.mixed():
        seconds = [
            np.array(measured.plan(trial, ["gpu_seconds"])["gpu_seconds"]) for trial in trials
        ]
        total = float(np.mean([values.sum() for values in seconds]))
        each = float(np.mean([values.mean() for values in seconds]))
        gain = measured.gain(arm)
        price = f"{total / gain:.0f}" if gain > 0 else "no gain"
        rows.append((arm.label, f"{each:.4f}", f"{total:.0f}", f"{gain:+.1f}", price))
        measured.figures[f"seconds_an_image.{arm.name}"] = each
    head = (
        "arm",
        "seconds per image",
        "seconds in all",
        "gain in domain",
        "seconds per gained point",
    )
    note = "Seconds of one generator actor; several share the machine."
    return [Table("Cost", head, tuple(rows), note)]


def measure_meanings(measured: Measured) -> list[Table]:
    """What language models mean by the classes: agreement, doubts, and where they differ."""
    seed = measured.grid.trials[0].seed
    outcomes, choices = [], {}
    for arm, trials in measured.mixed():
        trial = next(trial for trial in trials if trial.seed == seed)
        run = measured.run(trial)
        entries = read_meanings(run.folder)
        model = run.config.meaning.llm.model
        outcomes.append(Outcome(arm.label, model, entries))
        choices[arm.label] = outcomes[-1].choices()
    rows = compare(outcomes, same=lambda a, b: phrase_key(a) == phrase_key(b))
    agreement = Table(
        "Meanings",
        ("language model", "agrees with the others, %", "confidence", "ambiguous, %",
         "refused phrases"),
        tuple(
            (row["backend"], f"{100 * (row['agreement'] or 0):.0f}", f"{row['confidence']:.2f}",
             f"{100 * row['ambiguous']:.0f}", str(row["refused"]))
            for row in rows
        ),
        f"Of seed {seed}; two choices agree where they are the same words.",
    )  # fmt: skip
    names = list(next(iter(choices.values())))
    chosen = Table(
        "Chosen meanings",
        ("class", *choices),
        tuple((name, *(mine[name] for mine in choices.values())) for name in names),
    )
    return [agreement, chosen]


def explained(measured: Measured, found: dict[Arm, np.ndarray], names: Sequence[str]) -> str:
    """Rank correlations of what was measured with the gain, over the study's arms."""
    gains = [measured.gain(arm) for arm in found]
    parts = []
    for column, name in enumerate(names):
        means = [float(np.nanmean(values[:, column])) for values in found.values()]
        for arm, mean in zip(found, means, strict=True):
            measured.figures[f"{name}.{arm.name}"] = mean
        known = [
            (m, g) for m, g in zip(means, gains, strict=True) if np.isfinite(m) and np.isfinite(g)
        ]
        rho = correlation([m for m, _ in known], [g for _, g in known])
        if np.isfinite(rho):
            parts.append(f"{name} {rho:+.2f}")
    if not parts:
        return ""
    return (
        f"Rank correlation with the gain in domain over {len(gains)} arms (so few can only hint): "
        + ", ".join(parts)
        + "."
    )


def _by_arm(
    title: str,
    found: dict[Arm, np.ndarray],
    names: Sequence[str],
    measured: Measured,
    note: str,
    *,
    digits: int,
) -> Table:
    rows = []
    for arm, values in found.items():
        means = [f"{value:.{digits}f}" for value in np.nanmean(values, axis=0)]
        rows.append((arm.label, *means, f"{measured.gain(arm):+.1f}"))
    return Table(title, ("arm", *names, "gain in domain"), tuple(rows), note.strip())


def trials_by_key(trials: Sequence[Trial], read: Callable[[Trial], Any]) -> dict[Any, Any]:
    """Something of each trial, by its arm's name and its seed."""
    return {(trial.arm.name, trial.seed): read(trial) for trial in trials}
