"""What each part of the meaning rule is worth: the same questions with one part left out at a time.

Features are at hand, so that a question costs a millisecond. The paper's rule, as this project had it
before, is there to compare with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jobs.meaning_questions import Question
from ray_synth.meaning.background import WORTH, Background
from ray_synth.meaning.candidates import TEMPLATES, Candidate, candidate_texts, with_article
from ray_synth.meaning.ranking import rank_meanings, unit_means

BEFORE_AGREEMENT, BEFORE_TEMPERATURE = 0.006 * 3, 0.0136  # of cosine similarity
Embed = Callable[[Sequence[str]], np.ndarray]
Answer = tuple[str, float, bool]  # choice, confidence, ambiguous


@dataclass(frozen=True, eq=False)
class _Level(Background):
    """A background of which only the means count."""

    def of_texts(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        means, spreads = super().of_texts(texts)
        return means, np.full_like(spreads, spreads.mean())


class Rules:
    """The rule, and the rule without each of its parts.

    Args:
        embed: unit-norm features of texts.
        shipped: the background of the package's pictures.
    """

    def __init__(self, embed: Embed, shipped: Background) -> None:
        self.embed, self.shipped = embed, shipped

    def before(self, question: Question) -> Answer:
        """The paper's rule with the bare name, as it was: cosine similarity of short phrases."""
        candidates = [replace(c, text="") for c in question.candidates]
        candidates.append(Candidate(question.class_name, "name"))
        scores = unit_means(self._texts(candidates)) @ question.images.mean(axis=0)
        scores[:-1] += BEFORE_AGREEMENT
        first = int(scores.argmax())
        odds = np.exp((scores - scores.max()) / BEFORE_TEMPERATURE)
        rivals = odds if first == len(odds) - 1 else odds[:-1]
        confidence = float(odds[first] / rivals.sum())
        return candidates[first].meaning, confidence, confidence < 0.5

    def whole(self, question: Question) -> Answer:
        """The rule."""
        return self._ask(question)

    def one_class(self, question: Question) -> Answer:
        """Without other classes' images, as where one class is asked about alone."""
        return self._ask(question, background=self.shipped)

    def right_odds(self, question: Question, temperature: float) -> float:
        """The probability of all that is right, at a temperature."""
        found = rank_meanings(
            question.candidates,
            question.images,
            self._texts(question.candidates),
            background=self._near(question),
            temperature=temperature,
        )
        return max(
            sum(c["probability"] for c in found["candidates"] if c["meaning"] in question.right),
            1e-6,
        )

    def parts(self) -> dict[str, Callable[[Question], Answer]]:
        """Each way to ask, by what it is called in the table."""
        return {
            "before": self.before,
            "the rule": self.whole,
            "one class alone": self.one_class,
            "without any background": lambda q: self._ask(q, background=None),
            "without the package's pictures": lambda q: self._ask(q, background=q.others),
            "without the spread": lambda q: self._ask(q, background=_Level(**vars(self._near(q)))),
            "phrase for the whole gloss": lambda q: self._ask(
                q, candidates=[replace(c, text="") for c in q.candidates]
            ),
            "kinds of sense alike": lambda q: self._ask(
                q, candidates=[replace(c, thing=True) for c in q.candidates]
            ),
            "the bare name as a rival": lambda q: self._ask(
                q, candidates=[*q.candidates, Candidate(with_article(q.class_name), "user")]
            ),
        }

    def _near(self, question: Question) -> Background:
        return question.others + self.shipped.worth(WORTH)

    def _ask(self, question: Question, **options: Any) -> Answer:
        candidates = options.pop("candidates", question.candidates)
        if "background" not in options:
            options["background"] = self._near(question)
        found = rank_meanings(candidates, question.images, self._texts(candidates), **options)
        return found["choice"], found["confidence"], found["ambiguous"]

    def _texts(self, candidates: Sequence[Candidate]) -> np.ndarray:
        texts = [text for candidate in candidates for text in candidate_texts(candidate)]
        return self.embed(texts).reshape(len(candidates), len(TEMPLATES), -1)


def part_rows(questions: dict[str, list[Question]], rules: Rules) -> list[dict[str, Any]]:
    """Percent right in each test, by part left out; the first row is what guessing would give."""
    chance = {
        test: 100 * float(np.mean([len(q.shows) / len(q.candidates) for q in some]))
        for test, some in questions.items()
    }
    rows = [{"rule": "chance", **chance}]
    for name, ask in rules.parts().items():
        right = {
            test: 100 * float(np.mean([ask(q)[0] in q.right for q in some]))
            for test, some in questions.items()
        }
        rows.append({"rule": name, **right})
    return rows


def costs(questions: list[Question], clip: Any, rules: Rules) -> dict[str, float]:
    """Milliseconds per class: reading its candidates' texts, and ranking them."""
    texts = [text for q in questions for c in q.candidates for text in candidate_texts(c)]
    begin = time.perf_counter()
    clip.encode_texts(texts)
    read = time.perf_counter()
    for question in questions:
        rules.before(question)
    before = time.perf_counter()
    for question in questions:
        rules.whole(question)
    ranked = time.perf_counter()
    each = 1000 / len(questions)
    return {
        "texts": round((read - begin) * each, 2),
        "rank_before": round((before - read) * each, 2),
        "rank": round((ranked - before) * each, 2),
    }


def part_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    for row in rows:
        lines.append(f"| {row['rule']} | " + " | ".join(f"{row[n]:.1f}%" for n in names[1:]) + " |")
    return "\n".join(lines)
