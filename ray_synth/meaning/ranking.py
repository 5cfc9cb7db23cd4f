"""Candidate meanings in order: the paper's rule, with probabilities and a word on doubtful cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_synth.meaning.candidates import Candidate

AGREEMENT = 0.006  # ours: what an answer that says a phrase again is worth, in cosine similarity
MOST_AGREEMENT = 3
SURE = 0.5  # below this probability a choice is called ambiguous


def rank_meanings(
    candidates: Sequence[Candidate],
    image_features: np.ndarray,
    text_features: np.ndarray,
    *,
    agreement: float = AGREEMENT,
    reference_features: np.ndarray | None = None,
    context_logits: np.ndarray | None = None,
    temperature: float = 0.01,
) -> dict[str, Any]:
    """Rank candidates by their mean cosine similarity to the images (the paper's rule).

    The additions are ours. Each of the LLM's answers that gave a phrase, up to three, adds
    `agreement` to its score: it settles what the images leave nearly tied in favour of what the
    model says again and again, and of a meaning over the bare name. 0 is the paper's rule alone.

    Args:
        candidates: in any order; the first of equals wins.
        image_features: (num_images, dim), unit rows; (0, dim) where only the context decides.
        text_features: (num_candidates, num_templates, dim), unit rows; templates are averaged, and
            the average is scaled to length 1.
        agreement: worth of one answer, see above; a user's phrase has the full bonus.
        reference_features: (n, dim) unit rows, features of other classes' images (the second
            addition, optional): a phrase's mean similarity to them is taken off its score, so that
            a phrase that is close to every image wins nothing by it.
        context_logits: (num_candidates,) nats by which a context speaks for each (the third).
        temperature: cosine similarity worth a factor e of probability (temperature scaling, Guo et
            al. 2017).

    Returns:
        `candidates` ({meaning, score, similarity, probability, answers, source, merged}, best score
        first), `choice`, `margin`, the score of the first over the second (None when there is no
        second), `confidence`, the probability of the choice, and `ambiguous`.
    """
    assert text_features.shape[0] == len(candidates) > 0
    texts = unit_means(text_features)
    by_image = texts @ image_features.T  # (candidates, images)
    similarities = by_image.mean(axis=1) if by_image.shape[1] else np.zeros(len(candidates))
    scores = similarities + agreement * _agreement(candidates)
    if reference_features is not None and by_image.shape[1]:
        scores = scores - (texts @ reference_features.T).mean(axis=1)
    if context_logits is not None:
        scores = scores + temperature * context_logits
    order = sorted(range(len(candidates)), key=lambda i: (-scores[i], i))
    first = order[0]
    odds = np.exp((scores - scores.max()) / temperature)
    # The bare name holds every sense: unless it wins, it is not a rival of theirs.
    rivals = [i for i in order if candidates[i].source != "name" or i == first]
    confidence = float(odds[first] / odds[rivals].sum())
    columns = {"score": scores, "similarity": similarities, "probability": odds / odds.sum()}
    return {
        "candidates": [
            _entry(candidates[i], {name: float(column[i]) for name, column in columns.items()})
            for i in order
        ],
        "choice": candidates[first].meaning,
        "margin": round(float(scores[first] - scores[order[1]]), 6) if len(order) > 1 else None,
        "confidence": round(confidence, 6),
        "ambiguous": confidence < SURE or _is_tied(by_image, scores, rivals),
    }


def _agreement(candidates: Sequence[Candidate]) -> np.ndarray:
    """How many answers gave each phrase, as far as they count; (num_candidates,)."""
    return np.array(
        [
            MOST_AGREEMENT if c.source in ("user", "lexicon") else min(c.answers, MOST_AGREEMENT)
            for c in candidates
        ]
    )


def _entry(candidate: Candidate, figures: dict[str, float]) -> dict[str, Any]:
    """A candidate as meanings.json has it."""
    return {
        "meaning": candidate.meaning,
        **{name: round(value, 6) for name, value in figures.items()},
        "answers": candidate.answers,
        "source": candidate.source,
        "merged": list(candidate.merged),
    }


def _is_tied(by_image: np.ndarray, scores: np.ndarray, rivals: list[int]) -> bool:
    """Whether the lead over the next meaning is within what other images could have changed.

    The lead's standard error comes from the images' own differences; less than one is a tie.
    """
    num_images = by_image.shape[1]
    if len(rivals) < 2 or num_images < 2:
        return False
    first, second = rivals[:2]
    error = (by_image[first] - by_image[second]).std(ddof=1) / num_images**0.5
    return bool(scores[first] - scores[second] < error)


def unit_means(text_features: np.ndarray) -> np.ndarray:
    """Means over templates, (num_candidates, dim), scaled to length 1."""
    texts = text_features.mean(axis=1)
    return texts / np.linalg.norm(texts, axis=1, keepdims=True).clip(1e-12)
