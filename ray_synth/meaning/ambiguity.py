"""Label ambiguity resolution (LAR, the paper's section 3.1): which meaning do the images show?

A class name, its images' features and two callables (an LLM, a text encoder) go in; the class's
entry of meanings.json comes out. K, N, the templates and the prompts are ours: the paper names none.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_synth.meaning.answers import clean_phrase, parse_meanings, phrase_key
from ray_synth.meaning.llm import FewShot

# ours: an ensemble, as in CLIP's zero-shot classification, steadies short texts
TEMPLATES = ("a photo of {}", "a picture of {}", "{}")
EXAMPLES_SHOWN = 3

TASK = "Each word has several meanings."
# senses of every sort: creatures, tools, places, and signs or letters
EXAMPLES: tuple[tuple[str, str], ...] = (
    ("crane", "a large wading bird with long legs; a tall machine for lifting loads"),
    ("alpha", "the first letter of the Greek alphabet; the leader of a pack of wolves"),
    ("bat", "a small flying mammal; a wooden club for hitting a ball"),
    ("plus", "the sign + that means addition; an advantage"),
    ("mouse", "a small rodent with a long tail; a device that moves a cursor"),
    ("jaguar", "a large spotted wild cat; a brand of car"),
    ("heart", "the organ that pumps blood; a red shape that stands for love"),
    ("bank", "a building where money is kept; the side of a river"),
    ("kite", "a toy that flies on a string; a bird of prey"),
    ("comma", "the mark , in a sentence; a butterfly with ragged wings"),
)


@dataclass(frozen=True)
class Candidate:
    """A meaning that a class name may have.

    Attributes:
        meaning: the phrase.
        source: "llm", "user", or "name" for the bare class name.
    """

    meaning: str
    source: str


def meaning_question(class_name: str, *, seed: int) -> FewShot:
    """The few-shot prompt for meanings; the seed draws which examples are shown."""
    shown = np.random.default_rng(seed).permutation(len(EXAMPLES))[:EXAMPLES_SHOWN]
    name = class_name.replace("_", " ")
    return FewShot(TASK, tuple(EXAMPLES[i] for i in shown), name, ("Word", "Meanings"))


def candidate_texts(class_name: str, candidate: Candidate) -> list[str]:
    """What the text encoder reads of a candidate: one text a template."""
    name = class_name.replace("_", " ")
    phrase = with_article(name) if candidate.source == "name" else f"{name}, {candidate.meaning}"
    return [template.format(phrase) for template in TEMPLATES]


def rank_meanings(
    class_name: str,
    candidates: Sequence[Candidate],
    image_features: np.ndarray,
    text_features: np.ndarray,
    *,
    reference_features: np.ndarray | None = None,
) -> dict[str, Any]:
    """Rank candidates by their mean cosine similarity to the images (the paper's rule).

    Args:
        candidates: the bare name among them, at most once.
        image_features: (num_images, dim), unit rows.
        text_features: (num_candidates, num_templates, dim), unit rows; templates are averaged, and
            the average is scaled to length 1.
        reference_features: (n, dim) unit rows, features of other classes' images (ours, optional):
            a phrase's mean similarity to them is taken off its score, so that a phrase that is
            close to every image wins nothing by it.

    Returns:
        `candidates` ({meaning, score, source}, best first), `choice`, and `margin` between the
        first and the second (None when there is no second).
    """
    assert text_features.shape[0] == len(candidates) > 0
    texts = text_features.mean(axis=1)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True).clip(1e-12)
    scores = (texts @ image_features.T).mean(axis=1)
    if reference_features is not None:
        scores = scores - (texts @ reference_features.T).mean(axis=1)
    order = sorted(range(len(candidates)), key=lambda i: (-scores[i], i))
    ranked = [
        {
            "meaning": candidates[i].meaning,
            "score": round(float(scores[i]), 6),
            "source": candidates[i].source,
        }
        for i in order
    ]
    margin = float(scores[order[0]] - scores[order[1]]) if len(order) > 1 else None
    return {
        "candidates": ranked,
        "choice": ranked[0]["meaning"],
        "margin": margin if margin is None else round(margin, 6),
    }


async def resolve_meaning(
    class_name: str,
    *,
    image_features: np.ndarray,
    complete: Callable[..., Awaitable[str]],
    embed_texts: Callable[[list[str]], Awaitable[np.ndarray]],
    num_meanings: int = 5,
    retries: int = 2,
    seed: int = 0,
    meanings: Sequence[str] | None = None,
    reference_features: np.ndarray | None = None,
) -> dict[str, Any]:
    """One class's entry of meanings.json.

    Bad answers never raise: they are counted, kept raw, and asked again with new seeds.

    Args:
        image_features: (num_images, dim) unit rows: the class's N real images.
        complete: answers a `FewShot` and a seed, with generation options by keyword.
        embed_texts: unit-norm text features, (n, dim).
        num_meanings: K, how many answers are asked for and how many phrases at least must be in
            them; every distinct phrase is ranked.
        retries: further rounds of asking while there are fewer than K.
        meanings: phrases of the user's, ranked with the LLM's.
        reference_features: see `rank_meanings`.

    Raises:
        ValueError: there are no image features, or a meaning of the user's cannot go in a prompt.
    """
    if len(image_features) == 0:
        raise ValueError(f"class {class_name!r} has no images to judge its meanings by")
    found: dict[str, Candidate] = {}
    for phrase in meanings or ():
        cleaned = clean_phrase(phrase)
        if not cleaned:
            raise ValueError(f"meaning {phrase!r} cannot be used: give at most 12 plain words")
        found.setdefault(phrase_key(cleaned), Candidate(cleaned, "user"))
    raw: list[str] = []
    refused = written = 0
    for turn in range(retries + 1):
        if written >= num_meanings:
            break
        seeds = [
            few_shot_seed(seed, class_name, "meaning", turn * num_meanings + i)
            for i in range(num_meanings)
        ]
        answers = await asyncio.gather(
            *(
                complete(
                    meaning_question(class_name, seed=s),
                    s,
                    max_new_tokens=32,
                    temperature=0.8,
                    stop=("\n\n",),
                )
                for s in seeds
            )
        )
        for answer in answers:
            raw.append(answer)
            phrases, bad = parse_meanings(answer, class_name)
            refused += bad
            for phrase in phrases:
                if phrase_key(phrase) not in found:
                    found[phrase_key(phrase)] = Candidate(phrase, "llm")
                    written += 1
    candidates = [*found.values(), Candidate(class_name, "name")]
    texts = [candidate_texts(class_name, candidate) for candidate in candidates]
    features = await embed_texts([text for group in texts for text in group])
    ranking = rank_meanings(
        class_name,
        candidates,
        image_features,
        np.asarray(features).reshape(len(candidates), len(TEMPLATES), -1),
        reference_features=reference_features,
    )
    return {
        "class_name": class_name,
        **ranking,
        "num_images": len(image_features),
        "num_refused": refused,
        "raw_answers": raw,
    }


def few_shot_seed(seed: int, class_name: str, purpose: str, number: int) -> int:
    """A 48-bit seed for one question: the same everywhere, whatever else is asked beside it."""
    digest = hashlib.sha256(f"{seed}:{class_name}:{purpose}:{number}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def with_article(name: str) -> str:
    """ "a crane", "an owl"; names that have an article, are proper or plural stay as they are."""
    name = name.replace("_", " ").strip()
    if re.match(r"(?i)(an?|the)\s", name) or name[:1].isupper() or re.search(r"[^su]s$", name):
        return name
    return f"{'an' if re.match(r'[aeiou]', name) else 'a'} {name}"
