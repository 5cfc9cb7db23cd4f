"""Meanings resolved in one process, without Ray: a loaded LLM and CLIP answer `resolve_meaning`.

Questions go in together and are answered together, in full batches, as the service does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ray_synth.errors import UserError
from ray_synth.meaning.ambiguity import Models, resolve_meaning
from ray_synth.meaning.background import Background
from ray_synth.meaning.candidates import Candidate
from ray_synth.meaning.clip import ClipModel
from ray_synth.meaning.few_shot import FewShot
from ray_synth.meaning.language_model import Llm
from ray_synth.meaning.ranking import TEMPERATURE

GATHER_S = 0.02  # how long questions are collected before the model is asked
Asked = tuple[FewShot, int, dict[str, Any], "asyncio.Future[str]"]


class MeaningModels:
    """An LLM and a CLIP that resolve many classes at once.

    Args:
        llm: as `load_llm` gives it; None where only given meanings are ranked by images.
        clip: as `load_clip` gives it. A text is embedded once.
        temperature, merge_at: see `resolve_meaning`; None is the default, or the CLIP model's own.
        senses: a lexicon's candidates for a name.
        background: of questions that have none of their own.
    """

    def __init__(
        self,
        llm: Llm | None,
        clip: ClipModel,
        *,
        temperature: float | None = None,
        merge_at: float | None = None,
        senses: Callable[[str], list[Candidate]] | None = None,
        background: Background | None = None,
    ) -> None:
        self.llm, self.clip = llm, clip
        self.temperature = temperature or TEMPERATURE
        self.background = background
        self.merge_at = merge_at or clip.merge_similarity
        self.senses = senses
        self._texts: dict[str, np.ndarray] = {}
        self._waiting: list[Asked] = []

    def resolve_all(self, questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """meanings.json entries, in order.

        Args:
            questions: arguments of `resolve_meaning`: `class_name`, `image_features`, and so on.

        Raises:
            UserError: as the LLM or `resolve_meaning` does.
        """

        async def resolve_each() -> list[dict[str, Any]]:
            self._waiting = []  # what an error left unanswered is of a loop that is closed
            models = Models(self._complete, self._embed_texts, self._likelihood, self.senses)
            return await asyncio.gather(
                *(
                    resolve_meaning(
                        **{"background": self.background} | question,
                        models=models,
                        temperature=self.temperature,
                        merge_at=self.merge_at,
                    )
                    for question in questions
                )
            )

        return asyncio.run(resolve_each())

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) unit rows."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            self._texts |= dict(zip(new, self.clip.encode_texts(new), strict=True))
        return np.stack([self._texts[text] for text in texts])

    async def _embed_texts(self, texts: list[str]) -> np.ndarray:
        return self.embed_texts(texts)

    async def _likelihood(self, prompts: list[Any], answers: list[str]) -> list[float] | None:
        return self.llm.likelihood(prompts, answers) if self.llm else None

    async def _complete(self, prompt: FewShot, seed: int, **options: Any) -> str:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._waiting.append((prompt, seed, options, answer))
        if len(self._waiting) == 1:
            loop.call_later(GATHER_S, self._answer)
        return await answer

    def _answer(self) -> None:
        """Ask the model all that waits; what it raises, every question raises."""
        asked, self._waiting = self._waiting, []
        while asked:
            options = asked[0][2]
            batch = [item for item in asked if item[2] == options]
            asked = [item for item in asked if item[2] != options]
            futures = [future for *_, future in batch]
            try:
                if self.llm is None:
                    raise UserError("there is no LLM to ask: give meanings, and num_meanings 0")
                texts = self.llm.complete(
                    [prompt for prompt, *_ in batch], seeds=[item[1] for item in batch], **options
                )
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, text in zip(futures, texts, strict=True):
                if not future.done():
                    future.set_result(text)
