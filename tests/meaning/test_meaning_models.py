"""Questions are answered together, texts embedded once, and an error leaves nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jobs.meaning_models import MeaningModels
from ray_synth.meaning.candidates import Candidate
from ray_synth.meaning.few_shot import FewShot

BIRD, MACHINE = "a large wading bird", "a machine for lifting"
IMAGES = np.tile(np.eye(4, dtype=np.float32)[0], (2, 1))


class Clip:
    """Texts with the word "bird" point to the images; notes what it was asked."""

    merge_similarity = 0.99

    def __init__(self) -> None:
        self.texts: list[list[str]] = []

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.texts.append(list(texts))
        axes = np.eye(4, dtype=np.float32)
        return np.stack([axes[0 if "bird" in text else 1 + len(text) % 3] for text in texts])


class Llm:
    """Gives the one answer to odd seeds and the other to even ones; notes its batches."""

    def __init__(self, problem: Exception | None = None, *, odd: str = BIRD, even: str = MACHINE):
        self.problem, self.odd, self.even = problem, odd, even
        self.batches: list[tuple[list[str], list[int], dict[str, Any]]] = []

    def complete(
        self, prompts: Sequence[FewShot], *, seeds: Sequence[int], **options: Any
    ) -> list[str]:
        self.batches.append(([p.question for p in prompts], list(seeds), options))
        if self.problem:
            raise self.problem
        return [self.odd if seed % 2 else self.even for seed in seeds]

    def likelihood(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        return [
            -1.0 if "machine" in f"{prompt} {answer}" else -90.0
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def question(name: str, **options: Any) -> dict[str, Any]:
    return {"class_name": name, "image_features": IMAGES, "num_meanings": 2, "retries": 0} | options


def test_all_questions_go_to_the_model_together_and_each_has_its_answer() -> None:
    llm = Llm()
    entries = MeaningModels(llm, Clip()).resolve_all([question("crane"), question("heron")])
    assert [entry["class_name"] for entry in entries] == ["crane", "heron"]
    assert {entry["choice"] for entry in entries} == {BIRD}
    ((asked, seeds, options),) = llm.batches
    assert sum(text.startswith("crane,") for text in asked) == len(asked) / 2 == 6
    assert len(set(seeds)) == 12 and options["max_new_tokens"] == 16
    said = [BIRD if seed % 2 else MACHINE for seed in seeds]
    assert [answer for entry in entries for answer in entry["raw_answers"]] == said


def test_a_text_is_embedded_once() -> None:
    clip = Clip()
    models = MeaningModels(None, clip)
    given = {"num_meanings": 0, "meanings": ["a tall bird", "a machine"]}
    for _ in range(2):
        entries = models.resolve_all([question("crane", **given), question("crane", **given)])
        assert entries[0]["choice"] == "a tall bird"
    embedded = [text for texts in clip.texts for text in texts]
    assert len(embedded) == len(set(embedded)) == 6
    assert all(clip.texts)  # and not even an empty list is asked for again
    rows = models.embed_texts(["a machine", "an image of a tall bird", "a machine"])
    assert (rows == clip.encode_texts(["a machine", "bird", "a machine"])).all()


def test_the_settings_and_the_lexicon_are_used() -> None:
    given = {"num_meanings": 0, "meanings": ["a bird", "a wader"]}
    cold, warm = (
        MeaningModels(None, Clip(), temperature=t).resolve_all([question("crane", **given)])[0]
        for t in (None, 100.0)
    )
    assert cold["confidence"] > 0.99 > warm["confidence"]
    senses = MeaningModels(
        None, Clip(), senses=lambda name: [Candidate(f"a bird called {name}", "lexicon")]
    )
    entry = senses.resolve_all([question("crane", num_meanings=0)])[0]
    assert entry["candidates"][0]["source"] == "lexicon"
    birds = Llm(even="a tall bird")
    sizes = [
        len(
            MeaningModels(birds, Clip(), merge_at=at).resolve_all([question("crane")])[0][
                "candidates"
            ]
        )
        for at in (None, 1.5)
    ]
    assert sizes == [2, 3]  # the bare name, and one phrase or two


def test_a_context_is_judged_by_the_model() -> None:
    asked = {"image_features": None, "context": "from a building site", "num_meanings": 0}
    given = {"meanings": ["a wading bird", MACHINE]}
    entry = MeaningModels(Llm(), Clip()).resolve_all([question("crane", **asked, **given)])[0]
    assert entry["choice"] == MACHINE and not entry["ambiguous"]


@pytest.mark.parametrize("problem", [ValueError("the server is gone"), MemoryError("too large")])
def test_what_the_model_raises_is_raised(problem: Exception) -> None:
    with pytest.raises(type(problem), match=str(problem)):
        MeaningModels(Llm(problem), Clip()).resolve_all([question("crane"), question("heron")])


def test_without_a_model_there_is_nobody_to_ask() -> None:
    with pytest.raises(ValueError, match="no LLM to ask: give meanings, and num_meanings 0"):
        MeaningModels(None, Clip()).resolve_all([question("crane")])


@pytest.mark.timeout(20)
def test_one_bad_question_does_not_leave_the_next_waiting_for_ever() -> None:
    models = MeaningModels(Llm(), Clip())
    with pytest.raises(ValueError, match="no images"):
        models.resolve_all([question("crane"), question("heron", image_features=None)])
    assert models.resolve_all([question("crane")])[0]["choice"] == BIRD
