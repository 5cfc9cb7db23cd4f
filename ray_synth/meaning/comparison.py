"""Several language models asked about the same classes: what they agree on. Pure.

Each backend's meanings.json entries and costs go in as an `Outcome`; a row of figures for each comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_synth.meaning.answers import phrase_key

Same = Callable[[str, str], bool]


@dataclass(frozen=True)
class Outcome:
    """What came of asking one backend about all classes.

    Attributes:
        name, model: of the backend, and of its model.
        entries: the classes' entries of meanings.json; none where it failed.
        seconds: from the first question to the last answer; loading the model is not counted.
        questions, prompt_tokens, answer_tokens: what it was asked, as `Usage` counts.
        problem: why it failed; "" where it did not.
    """

    name: str
    model: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    questions: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    problem: str = ""

    def choices(self) -> dict[str, str]:
        """Class name -> chosen meaning."""
        return {entry["class_name"]: entry["choice"] for entry in self.entries}


def names_it(choice: str, accepted: Iterable[str]) -> bool:
    """Whether one of the words or phrases occurs in the choice as whole words."""
    words = f" {phrase_key(choice)} "
    return any(f" {phrase_key(phrase)} " in words for phrase in accepted)


def compare(
    outcomes: Sequence[Outcome], *, same: Same, truth: Mapping[str, list[str]] | None = None
) -> list[dict[str, Any]]:
    """One row per backend; shares are 0..1, and None where there is nothing to compare with.

    `agreement` is the share of classes whose choice means the same as another backend's, averaged
    over the others that answered; `accuracy` is over the classes of `truth`.
    """
    answered = [outcome for outcome in outcomes if not outcome.problem]
    rows = []
    for outcome in outcomes:
        row: dict[str, Any] = {"backend": outcome.name, "model": outcome.model}
        if outcome.problem:
            rows.append({**row, "problem": outcome.problem})
            continue
        mine = outcome.choices()
        others = [other.choices() for other in answered if other is not outcome]
        shares = [_share(same(mine[name], theirs[name]) for name in mine) for theirs in others]
        judged = [names_it(mine[name], words) for name, words in (truth or {}).items()]
        rows.append(
            {
                **row,
                "classes": len(mine),
                "agreement": _share(shares),
                "accuracy": _share(judged),
                "judged": len(judged),
                "confidence": _share(entry["confidence"] for entry in outcome.entries),
                "ambiguous": _share(entry["ambiguous"] for entry in outcome.entries),
                "refused": sum(entry["num_refused"] for entry in outcome.entries),
                "seconds": round(outcome.seconds, 2),
                "questions": outcome.questions,
                "prompt_tokens": outcome.prompt_tokens,
                "answer_tokens": outcome.answer_tokens,
            }
        )
    return rows


def _share(values: Iterable[float | None]) -> float | None:
    given = [float(value) for value in values if value is not None]
    return round(sum(given) / len(given), 4) if given else None
