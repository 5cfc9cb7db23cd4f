"""Label ambiguity resolution (LAR, the paper's section 3.1): which meaning do the images show?

A class name, its images' features and two callables (an LLM, a text encoder) go in; the class's
entry of meanings.json comes out. The rule is the paper's; K, N, templates and prompts are ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_synth.meaning.answers import ARTICLES, clean_phrase, parse_meanings, phrase_key
from ray_synth.meaning.llm import FewShot

# The paper embeds the phrases; it names no template. Ours average several, as CLIP's zero-shot
# classification does, and hold the phrase alone: with the class name beside it, right and wrong
# phrases came 3 times closer together (the number of the digit against the next one, embedded CLIP).
TEMPLATES = ("an image of {}", "a good photo of {}")
ANSWERS_A_MEANING = 3  # answers asked for per meaning wanted: some repeat, some are refused

AGREEMENT = 0.006  # ours: what an answer that says a phrase again is worth, in cosine similarity
MOST_AGREEMENT = 3

# Ours: a small model lists senses badly, but answers well when told what kind of sense to give. Each
# kind comes with the article that its answers begin with.
KINDS = (
    ("an object", "a"),
    ("an animal", "a"),
    ("a number", "the"),
    ("a place", "a"),
    ("a letter or sign", "the"),
)
TASK = "What each word can mean."
EXAMPLES: tuple[tuple[str, str], ...] = (
    ("crane, an animal", "a large wading bird"),
    ("q, a letter or sign", "the letter Q"),
    ("bank, a place", "a building where money is kept"),
    ("mouse, an object", "a device that moves a cursor"),
)


@dataclass(frozen=True)
class Candidate:
    """A meaning that a class name may have.

    Attributes:
        meaning: the phrase.
        source: "llm", "user", or "name" for the bare class name.
        answers: how many of the LLM's answers gave it.
    """

    meaning: str
    source: str
    answers: int = 0


def meaning_question(class_name: str, *, turn: int) -> FewShot:
    """The few-shot prompt for one meaning; turns go round the kinds of sense."""
    kind, article = KINDS[turn % len(KINDS)]
    name = class_name.replace("_", " ")
    return FewShot(TASK, EXAMPLES, f"{name}, {kind}", ("Word", "Meaning"), article)


def candidate_texts(candidate: Candidate) -> list[str]:
    """What the text encoder reads of a candidate: one text a template."""
    bare = candidate.source == "name"
    phrase = with_article(candidate.meaning) if bare else candidate.meaning
    return [template.format(phrase) for template in TEMPLATES]


def rank_meanings(
    candidates: Sequence[Candidate],
    image_features: np.ndarray,
    text_features: np.ndarray,
    *,
    agreement: float = AGREEMENT,
    reference_features: np.ndarray | None = None,
) -> dict[str, Any]:
    """Rank candidates by their mean cosine similarity to the images (the paper's rule).

    Two additions are ours. Each of the LLM's answers that gave a phrase, up to three, adds
    `agreement` to its score: it settles what the images leave nearly tied in favour of what the
    model says again and again, and of a meaning over the bare name. 0 is the paper's rule alone.

    Args:
        candidates: in any order; the first of equals wins.
        image_features: (num_images, dim), unit rows.
        text_features: (num_candidates, num_templates, dim), unit rows; templates are averaged, and
            the average is scaled to length 1.
        agreement: worth of one answer, see above; a user's phrase has the full bonus.
        reference_features: (n, dim) unit rows, features of other classes' images (the second
            addition, optional): a phrase's mean similarity to them is taken off its score, so that
            a phrase that is close to every image wins nothing by it.

    Returns:
        `candidates` ({meaning, score, similarity, answers, source}, best score first), `choice`,
        and `margin`, the score of the first over the second (None when there is no second).
    """
    assert text_features.shape[0] == len(candidates) > 0
    texts = text_features.mean(axis=1)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True).clip(1e-12)
    similarities = (texts @ image_features.T).mean(axis=1)
    bonus = [
        MOST_AGREEMENT if c.source == "user" else min(c.answers, MOST_AGREEMENT) for c in candidates
    ]
    scores = similarities + agreement * np.array(bonus)
    if reference_features is not None:
        scores = scores - (texts @ reference_features.T).mean(axis=1)
    order = sorted(range(len(candidates)), key=lambda i: (-scores[i], i))
    ranked = [
        {
            "meaning": candidates[i].meaning,
            "score": round(float(scores[i]), 6),
            "similarity": round(float(similarities[i]), 6),
            "answers": candidates[i].answers,
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
        num_meanings: K, how many phrases the LLM must give at least; every distinct one is ranked.
        retries: further rounds of asking while it gave fewer than K, or the bare name still wins.
        meanings: phrases of the user's, ranked with the LLM's.
        reference_features: see `rank_meanings`.

    Raises:
        ValueError: there are no image features, or a meaning of the user's cannot go in a prompt.
    """
    if num_meanings < 1 or retries < 0:
        raise ValueError(
            f"num_meanings {num_meanings} must be 1 or more, retries {retries} 0 or more"
        )
    if len(image_features) == 0:
        raise ValueError(f"class {class_name!r} has no images to judge its meanings by")
    found: dict[str, Candidate] = {}
    for phrase in meanings or ():
        cleaned = clean_phrase(phrase)
        if not cleaned:
            raise ValueError(f"meaning {phrase!r} cannot be used: give at most 12 plain words")
        found.setdefault(phrase_key(cleaned), Candidate(cleaned, "user"))
    found[phrase_key(class_name)] = Candidate(class_name, "name")
    features: dict[str, np.ndarray] = {}
    raw: list[str] = []
    refused = 0
    for _ in range(retries + 1):
        turns = range(len(raw), len(raw) + ANSWERS_A_MEANING * num_meanings)
        questions = [meaning_question(class_name, turn=turn) for turn in turns]
        answers = await asyncio.gather(
            *(
                complete(
                    question,
                    few_shot_seed(seed, class_name, "meaning", turn),
                    max_new_tokens=16,
                    temperature=0.8,
                    stop=("\n\n",),
                )
                for turn, question in zip(turns, questions, strict=True)
            )
        )
        for question, answer in zip(questions, answers, strict=True):
            raw.append(answer)
            phrases, bad = parse_meanings(with_cue(question.cue, answer), class_name)
            refused += bad
            for phrase in phrases:
                known = found.setdefault(phrase_key(phrase), Candidate(phrase, "llm"))
                found[phrase_key(phrase)] = replace(known, answers=known.answers + 1)
        ranking = await _rank(
            list(found.values()), features, image_features, embed_texts, reference_features
        )
        written = sum(candidate.source == "llm" for candidate in found.values())
        if written >= num_meanings and ranking["candidates"][0]["source"] != "name":
            break
    return {
        "class_name": class_name,
        **ranking,
        "num_images": len(image_features),
        "num_refused": refused,
        "raw_answers": raw,
    }


async def _rank(
    candidates: list[Candidate],
    features: dict[str, np.ndarray],
    image_features: np.ndarray,
    embed_texts: Callable[[list[str]], Awaitable[np.ndarray]],
    reference_features: np.ndarray | None,
) -> dict[str, Any]:
    """`rank_meanings`, embedding only what `features` does not hold yet."""
    new = [candidate for candidate in candidates if candidate.meaning not in features]
    if new:
        texts = [text for candidate in new for text in candidate_texts(candidate)]
        rows = np.asarray(await embed_texts(texts)).reshape(len(new), len(TEMPLATES), -1)
        features |= {candidate.meaning: row for candidate, row in zip(new, rows, strict=True)}
    return rank_meanings(
        candidates,
        image_features,
        np.stack([features[candidate.meaning] for candidate in candidates]),
        reference_features=reference_features,
    )


def with_cue(cue: str, answer: str) -> str:
    """The answer with the cue in front, unless the model wrote an opening of its own."""
    first = next(iter(answer.split()), "")
    listed = re.match(r"\W|\d+[.)]", first)
    if not first or listed or first.casefold() in ARTICLES:
        return answer
    return f"{cue} {answer.strip()}"


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
