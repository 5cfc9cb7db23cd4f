"""What a language model is to us, whichever backend answers, and the count of what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ray_synth.meaning.few_shot import FewShot

SILENCE = 10  # questions after which a model that has answered none of them is not asked further


@dataclass
class Usage:
    """What was asked so far; tokens as the model counts them."""

    questions: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    empty: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(
        self, prompt_tokens: int, answer_tokens: int, *, questions: int = 1, empty: bool = False
    ) -> None:
        """Count a question (0: the same one again), and whether its answer was empty."""
        with self._lock:
            self.questions += questions
            self.prompt_tokens += prompt_tokens
            self.answer_tokens += answer_tokens
            self.empty += empty

    def is_silent(self) -> bool:
        """Whether all of several answers were empty: no accident, but a model that will not answer."""
        return self.questions == self.empty >= SILENCE


class Llm(Protocol):
    """What the service and the comparison ask of a language model."""

    device: str
    style: str
    usage: Usage

    def complete(
        self,
        prompts: Sequence[FewShot],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = ("\n\n",),
    ) -> list[str]:
        """One answer per prompt."""

    def likelihood(
        self, prompts: Sequence[FewShot | str], answers: Sequence[str]
    ) -> list[float] | None:
        """Log-probability of each answer after its prompt; None where the model does not say."""
