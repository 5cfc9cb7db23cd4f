"""Candidate meanings in order: one rule, with probabilities and a word on doubtful cases.

The paper ranks by mean cosine similarity to the images. Ours ranks by how far that stands above the
similarity to images of other things, in units of its spread over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_synth.meaning.background import Background
from ray_synth.meaning.candidates import Candidate

# Fitted by `jobs/meanings.py --fit` on questions of many kinds: standard deviations above the
# background that are worth a factor e of probability.
TEMPERATURE = 0.7
# Images of a class are alike, so the mean of many is not so much surer than one: their correlation.
ALIKE = 0.02
# Ours, in nats: what an answer that says a phrase again is worth, and what speaks against a sense that
# is no thing (an act, a person, a quality), since images are mostly taken of things.
AGREEMENT, NO_THING = 0.4, 2.5
# Of two phrases of the LLM's that images leave nearly tied the plain one: nats for each word from the
# fourth on. ("a number 7" before "the last letter of the number seven".)
WORD, PLAIN_WORDS = 0.2, 3
MOST_AGREEMENT = 3
SURE = 0.5  # below this probability a choice is called ambiguous
COSINE_SPREAD = 0.02  # of a text's similarities, where nothing is known of other images


def rank_meanings(
    candidates: Sequence[Candidate],
    image_features: np.ndarray,
    text_features: np.ndarray,
    *,
    background: Background | None = None,
    agreement: float = AGREEMENT,
    context_logits: np.ndarray | None = None,
    temperature: float = TEMPERATURE,
) -> dict[str, Any]:
    """Rank candidates by how far their similarity to the images stands above the background.

    What stands out no more than with images of other things has nothing from them, so that confidence
    is that of a guess. The bare name is no rival (`_rivals` says what is).

    Args:
        candidates: in any order; the first of equals wins.
        image_features: (num_images, dim), unit rows; (0, dim) where only the context decides.
        text_features: (num_candidates, num_templates, dim), unit rows; see `unit_means`.
        background: of images of other things, the class's own left out.
        agreement: nats that each of the LLM's answers with a phrase adds, up to three; a user's and
            a lexicon's have the full bonus.
        context_logits: (num_candidates,) nats by which a context speaks for each.
        temperature: standard deviations worth a factor e of probability.

    Returns:
        `candidates` ({meaning, score, deviations, similarity, probability, answers, source, merged},
        best first; scores in nats), `choice`, `margin`, the score of the first over the next (None
        when there is none), `confidence`, the probability of the choice, and `ambiguous`.
    """
    assert text_features.shape[0] == len(candidates) > 0
    texts = unit_means(text_features)
    by_image = texts @ image_features.T  # (candidates, images)
    similarities = _means(by_image)
    by_image = _deviations(texts, by_image, background)
    deviations = _means(by_image)
    scores = _evidence(deviations, by_image.shape[1], temperature)
    scores = scores + agreement * _agreement(candidates) - WORD * _long_winded(candidates)
    scores[[i for i, candidate in enumerate(candidates) if not candidate.thing]] -= NO_THING
    scores += 0 if context_logits is None else context_logits
    rivals = _rivals(candidates, deviations, heard=context_logits is not None)
    ranks = sorted(range(len(candidates)), key=lambda i: (i not in rivals, -scores[i], i))
    columns = {
        "score": scores,
        "deviations": deviations,
        "similarity": similarities,
        "probability": _probabilities(scores, rivals),
    }
    confidence = float(columns["probability"][ranks[0]])
    rivals = ranks[: len(rivals)]
    return {
        "candidates": [
            _entry(candidates[i], {name: float(column[i]) for name, column in columns.items()})
            for i in ranks
        ],
        "choice": candidates[ranks[0]].meaning,
        "margin": round(float(scores[ranks[0]] - scores[rivals[1]]), 6) if rivals[1:] else None,
        "confidence": round(confidence, 6),
        "ambiguous": confidence < SURE or _is_tied(by_image, rivals),
    }


def _probabilities(scores: np.ndarray, rivals: list[int]) -> np.ndarray:
    """Of each candidate; 0 for those that are no rivals."""
    odds = np.zeros(len(scores))
    odds[rivals] = np.exp(scores[rivals] - scores[rivals].max())
    return odds / odds.sum()


def _means(by_image: np.ndarray) -> np.ndarray:
    """Over images, (candidates,); 0 where there are none."""
    return by_image.mean(axis=1) if by_image.shape[1] else np.zeros(len(by_image))


def _evidence(deviations: np.ndarray, num_images: int, temperature: float) -> np.ndarray:
    """Nats by which the images speak for each candidate; what does not stand out has about none."""
    if not num_images:
        return deviations
    weight = 1 / np.sqrt(ALIKE + (1 - ALIKE) / num_images)  # a mean of many varies less than one
    return np.logaddexp(deviations * weight / temperature, 0)


def _deviations(
    texts: np.ndarray, by_image: np.ndarray, background: Background | None
) -> np.ndarray:
    """(candidates, images): similarities in standard deviations above the background.

    Each candidate's own spread counts half, that of all of them the other half: a text that is nearly
    the same to every picture would win by a spread that is small by chance.
    """
    if background is None:
        return by_image / COSINE_SPREAD
    means, spreads = background.of_texts(texts.astype(np.float64))
    spreads = np.sqrt(spreads * spreads.mean())
    return (by_image - means[:, None]) / spreads[:, None]


def _rivals(candidates: Sequence[Candidate], deviations: np.ndarray, *, heard: bool) -> list[int]:
    """Which candidates may be chosen.

    The bare name holds every sense and resolves nothing; a phrase of the LLM's that stands out less
    than an average one is not supported. Either is a rival only where nothing else is left or near.

    Args:
        heard: a context speaks too, so that images alone refuse nothing.
    """
    senses = [i for i, candidate in enumerate(candidates) if candidate.source != "name"]
    near = [i for i in senses if deviations[i] > 0]
    if not senses or (len(near) == 0 and not heard and deviations.max() > 0):
        return list(range(len(candidates)))  # nothing is near but the bare name
    sure = [i for i in senses if candidates[i].source != "llm" or deviations[i] > 0]
    return sure if sure and not heard and near else senses


def _agreement(candidates: Sequence[Candidate]) -> np.ndarray:
    """How many answers gave each phrase, as far as they count; (num_candidates,)."""
    return np.array(
        [
            MOST_AGREEMENT if c.source in ("user", "lexicon") else min(c.answers, MOST_AGREEMENT)
            for c in candidates
        ]
    )


def _long_winded(candidates: Sequence[Candidate]) -> np.ndarray:
    """Words beyond `PLAIN_WORDS` of the LLM's phrases; (num_candidates,)."""
    words = [len(c.meaning.split()) if c.source == "llm" else 0 for c in candidates]
    return np.maximum(np.array(words) - PLAIN_WORDS, 0)


def _entry(candidate: Candidate, figures: dict[str, float]) -> dict[str, Any]:
    """A candidate as meanings.json has it."""
    return {
        "meaning": candidate.meaning,
        **{name: round(value, 6) for name, value in figures.items()},
        "answers": candidate.answers,
        "source": candidate.source,
        "merged": list(candidate.merged),
    }


def _is_tied(by_image: np.ndarray, rivals: list[int]) -> bool:
    """Whether the lead over the next meaning is within what other images could have changed.

    The lead's standard error comes from the images' own differences; less than one is a tie.
    """
    num_images = by_image.shape[1]
    if len(rivals) < 2 or num_images < 2:
        return False
    lead = by_image[rivals[0]] - by_image[rivals[1]]
    return bool(lead.mean() < lead.std(ddof=1) / num_images**0.5)


def unit_means(text_features: np.ndarray) -> np.ndarray:
    """Means over templates, (num_candidates, dim), scaled to length 1."""
    texts = text_features.mean(axis=1)
    return texts / np.linalg.norm(texts, axis=1, keepdims=True).clip(1e-12)
