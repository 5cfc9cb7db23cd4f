"""Synonyms and parents of names: candidates, names for a lexicon, and the context of all others."""

import asyncio

import numpy as np
import pytest

from ray_synth.config import ClassInfo
from ray_synth.errors import UserError
from ray_synth.meaning.ambiguity import Models, resolve_meaning
from ray_synth.meaning.candidates import Candidate
from ray_synth.meaning.told import as_told

CRANE = ClassInfo(synonyms=["wading_bird"], parent="bird")
SENSES = {
    "crane": ["a lifting machine", "a large wader"],
    "wading_bird": ["a bird with long legs"],
}


def test_what_is_told_becomes_candidates_names_and_a_context():
    assert as_told(CRANE, None) == {
        "meanings": ["a wading bird", "a kind of bird"],
        "synonyms": ["wading_bird"],
        "context": "a kind of bird",
    }
    farm = as_told(ClassInfo(parent="bird"), "from a farm")
    assert farm["context"] == "from a farm, a kind of bird"
    assert as_told(None, "from a farm") == {"context": "from a farm"}
    assert as_told(ClassInfo(synonyms=["owl"]), None)["context"] is None


@pytest.mark.parametrize("wrong", ["a bird\nMeaning: x", "x" * 300, "(bird)", "bird, or not", "!"])
def test_what_would_change_a_question_or_a_prompt_is_refused(wrong):
    with pytest.raises(UserError):
        as_told(ClassInfo(parent=wrong), None)
    with pytest.raises(UserError):
        as_told(ClassInfo(synonyms=[wrong]), None)


def resolve(told: ClassInfo | None, images: np.ndarray, likely: str) -> dict:
    """With a text encoder that knows words alone, and an LLM that finds one word likely."""
    words = ["machine", "wader", "legs", "bird", "crane"]

    def embed(text: str) -> np.ndarray:
        row = np.array([float(word in text) for word in words]) + 0.1
        return row / np.linalg.norm(row)

    async def complete(question, seed, **options):
        return "a bird that stands in water"

    async def embed_texts(texts):
        return np.stack([embed(text) for text in texts])

    async def likelihood(prompts, answers):
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            text = prompt if isinstance(prompt, str) else f"{prompt.question} {answer}"
            found.append(-1.0 if likely in text.lower() else -30.0)
        return found

    models = Models(
        complete, embed_texts, likelihood,
        lambda name: [Candidate(phrase, "lexicon") for phrase in SENSES.get(name, ())],
    )  # fmt: skip
    return asyncio.run(
        resolve_meaning(
            "crane", image_features=images, models=models, num_meanings=1, **as_told(told, None)
        )
    )


def test_the_users_word_counts_beside_the_images():
    unclear = np.full((4, 5), 5**-0.5)
    entry = resolve(CRANE, unclear, likely="wader")
    by_phrase = {candidate["meaning"]: candidate for candidate in entry["candidates"]}
    assert by_phrase["a wading bird"]["source"] == "user"
    assert "a bird with long legs" in by_phrase, "a sense of the synonym's"
    assert entry["context"] == "a kind of bird"
    # What the context says itself is as likely as the best of the others, and not more.
    assert by_phrase["a large wader"]["probability"] > by_phrase["a lifting machine"]["probability"]
    assert (
        by_phrase["a kind of bird"]["probability"] > by_phrase["a lifting machine"]["probability"]
    )
    assert "a wading bird" not in {c["meaning"] for c in resolve(None, unclear, "x")["candidates"]}
