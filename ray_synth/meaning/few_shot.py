"""How a language model is asked: a task, worked examples and one open question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_synth.meaning.answers import without_thinking

# Variables of chat templates that switch a model's thinking off, or down; a template reads the one that
# it knows (Qwen, GLM, SmolLM: the first; DeepSeek, Granite: the second; OpenAI's open models: the third).
THINKING_OFF: dict[str, Any] = {
    "enable_thinking": False,
    "thinking": False,
    "reasoning_effort": "low",
}


@dataclass(frozen=True)
class FewShot:
    """A task, worked examples and one open question, independent of how a model wants it written.

    Attributes:
        task: what to do, in one or two sentences.
        examples: pairs of question and answer.
        question: the question to answer.
        labels: what introduces a question and an answer in plain text.
        cue: the first words of the answer, put in the model's mouth; not part of what it returns.
    """

    task: str
    examples: tuple[tuple[str, str], ...]
    question: str
    labels: tuple[str, str] = ("Question", "Answer")
    cue: str = ""

    def as_text(self) -> str:
        """The prompt for a model that continues text, ending right where the answer begins."""
        ask, answer = self.labels

        def after_label(text: str) -> str:
            return text if text[:1] in ("", "\n") else f" {text}"

        shown = [f"{ask}: {q}\n{answer}:{after_label(a)}\n\n" for q, a in self.examples]
        opening = f"{ask}: {self.question}\n{answer}:{after_label(self.cue)}"
        return f"{self.task}\n\n" + "".join(shown) + opening

    def as_messages(self) -> list[dict[str, str]]:
        """The prompt for a chat model: each example is a turn; the task opens the first one.

        There is no system message, because some chat templates refuse one. The cue is left out:
        a chat model that writes it again is understood all the same.
        """
        turns: list[dict[str, str]] = []
        for question, answer in self.examples:
            turns.append({"role": "user", "content": f"{self.labels[0]}: {question}"})
            turns.append({"role": "assistant", "content": answer.strip()})
        turns.append({"role": "user", "content": f"{self.labels[0]}: {self.question}"})
        turns[0]["content"] = f"{self.task}\n\n{turns[0]['content']}"
        return turns

    def answer_in(self, text: str, stop: Sequence[str]) -> str:
        """What a model wrote, up to the first of `stop`, or to where it asks itself the next question.

        What it thought before is no part of it: of a thought without an end, nothing is left.
        """
        text = without_thinking(text)
        marks = [*stop, *(f"\n{label}:" for label in self.labels)]
        return text[: min((at for mark in marks if (at := text.find(mark)) >= 0), default=None)]
