"""Which candidates of plan rows are kept: the hardest for the learner among those that the checks pass.

In: what was made of the same rows with several seeds, and how unsure the learner is of each image. Out:
one image row of each, and how many were passed over. Candidates of a row are compared with each other
alone, so that what is kept depends on no other row, and budgets and prompts stay as planned.

That fewer images do where they are pruned to the hard ones is the analysis of Deliberate Practice
(Askari-Hemmat et al. 2025, arXiv 2502.15588), whose own sampler is guided (`learner_guidance.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_synth.config import GenerationConfig
from ray_synth.errors import UserError
from ray_synth.generators.learner import Steering
from ray_synth.generators.protocol import Row

DIGITS = 3  # of an entropy that decides: what two devices add up differently is no difference


@dataclass(frozen=True)
class Attempt:
    """What was made of some rows with one seed each.

    Attributes:
        made: image rows, in order.
        again: those plan rows that another seed may help.
        entropies: the learner's, of each image in 0..1; None where there is no image, or no learner.
    """

    made: list[Row]
    again: list[Row]
    entropies: Sequence[float | None]

    def noted(self) -> list[Row]:
        """The image rows, with the learner's entropy, where it was asked, among the facts of each.

        To two digits: the column's text is kept once for all rows that share it.
        """
        rows = []
        for row, entropy in zip(self.made, self.entropies, strict=True):
            if entropy is None:
                rows.append(row)
                continue
            facts: dict[str, Any] = json.loads(row["generator"])
            facts["steering"]["entropy"] = round(entropy, 2)
            rows.append({**row, "generator": json.dumps(facts)})
        return rows


def candidates(steering: Steering | None) -> int:
    """How many images are made of each row."""
    return steering.select.factor if steering and steering.select else 1


def check_selection(config: GenerationConfig) -> None:
    """Raises UserError where nothing would tell hard images from wrong ones."""
    if config.checks.policy == "off" or not config.checks.label:
        raise UserError(
            "prompting.practice.select keeps images that are hard for the learner and right, and only "
            "the label check says what is right: set generation.checks.policy and label, or leave "
            "select out"
        )


def choose(tries: Sequence[Attempt]) -> Attempt:
    """Of each row the candidate that is kept, with the time that all of its candidates took.

    Candidates that a check found fault with come after all others, whatever its policy: a wrong image is
    hard for a good learner. Where there is no other, the first that is accepted is kept. Of equal
    candidates, the first.
    """
    made: list[Row] = []
    entropies: list[float | None] = []
    for at, rows in enumerate(zip(*(attempt.made for attempt in tries), strict=True)):
        found = [attempt.entropies[at] for attempt in tries]
        best = max(range(len(rows)), key=lambda i: (*_worth(rows[i], found[i]), -i))
        seconds = sum(row["gpu_seconds"] for row in rows)
        made.append({**rows[best], "gpu_seconds": seconds})
        entropies.append(found[best])
    hopeless = set.intersection(*({row["sample_id"] for row in a.again} for a in tries))
    again = [row for row in tries[0].again if row["sample_id"] in hopeless]
    return Attempt(made, again, entropies)


def _worth(row: Row, entropy: float | None) -> tuple[bool, bool, float]:
    right = row["accepted"] and not row["reject_reason"]
    return row["accepted"], right, round(entropy or 0.0, DIGITS) if right else 0.0
