"""Label ambiguity resolution (LAR, the paper's section 3.1): which meaning do the images show?

A class name, its images' features and two callables (an LLM, a text encoder) go in; the class's
entry of meanings.json comes out. The idea is the paper's; the rule (`ranking`), K, N, templates, prompts
and the judgement by a text context are ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_synth.errors import UserError
from ray_synth.meaning.answers import clean_phrase, parse_meanings, phrase_key
from ray_synth.meaning.background import Background
from ray_synth.meaning.candidates import (
    TEMPLATES,
    Candidate,
    candidate_texts,
    context_question,
    few_shot_seed,
    meaning_question,
    merge_alike,
    with_article,
    with_cue,
)
from ray_synth.meaning.ranking import TEMPERATURE, rank_meanings, unit_means

ANSWERS_A_MEANING = 3  # answers asked for per meaning wanted: some repeat, some are refused
CONTEXT_NATS = 4.0  # nats of the context's log-likelihood ratio that are worth one of probability
MOST_CONTEXT = 40.0  # nats; a small model is never surer than that
LIKENESS_NATS = 40.0  # nats for one of cosine similarity, where the LLM does not say


@dataclass(frozen=True)
class Models:
    """What answers the questions of `resolve_meaning`.

    Attributes:
        complete: answers a `FewShot` and a seed, with generation options by keyword.
        embed_texts: unit-norm text features, (n, dim).
        likelihood: log-probabilities of answers after prompts, for contexts; None, or an answer of
            None, where the LLM does not say.
        senses: a lexicon's candidates for a name.
    """

    complete: Callable[..., Awaitable[str]]
    embed_texts: Callable[[list[str]], Awaitable[np.ndarray]]
    likelihood: Callable[[list[Any], list[str]], Awaitable[list[float] | None]] | None = None
    senses: Callable[[str], list[Candidate]] | None = None


async def resolve_meaning(
    class_name: str,
    *,
    image_features: np.ndarray | None,
    models: Models,
    num_meanings: int = 5,
    retries: int = 2,
    seed: int = 0,
    meanings: Sequence[str] | None = None,
    synonyms: Sequence[str] = (),
    context: str | None = None,
    background: Background | None = None,
    temperature: float = TEMPERATURE,
    merge_at: float = 1.0,
) -> dict[str, Any]:
    """One class's entry of meanings.json, judged by images, by a text context, or by both.

    Bad answers are counted, kept raw, and asked again with new seeds.

    Args:
        image_features: (N, dim) unit rows, of the class's real images.
        num_meanings: K, how many phrases the LLM must give at least; every distinct one is ranked.
            0 asks it for none: the caller's and the lexicon's are ranked.
        retries: further rounds of asking while it gave fewer than K, or the bare name still wins,
            and no lexicon has senses.
        meanings, synonyms: the user's phrases, and names whose senses in a lexicon count too.
        context: what the name is one of, such as "from a list of farm animals".
        background, temperature, merge_at: see `rank_meanings` and `merge_alike`.

    Raises:
        UserError: neither images nor a context; or a meaning of the user's cannot go in a prompt.
    """
    if num_meanings < 0 or retries < 0:
        raise ValueError(f"num_meanings {num_meanings} and retries {retries} must be 0 or more")
    num_images = 0 if image_features is None else len(image_features)
    if not num_images and not context:
        raise UserError(f"class {class_name!r} has no images to judge its meanings by")
    senses = [s for name in (class_name, *synonyms) for s in (models.senses or _none)(name)]
    found = _given(meanings or (), senses)
    if not found and num_meanings == 0:
        raise UserError(
            f"there is no meaning of {class_name!r} to rank: give meanings, or num_meanings above 0"
        )
    found.setdefault(phrase_key(class_name), Candidate(class_name, "name"))
    answers = _Answers(class_name, context, models, seed=seed, found=found)
    judge = _Judge(class_name, context, models, image_features if num_images else None, background)
    for _ in range(1 if senses else retries + 1):
        await answers.ask(ANSWERS_A_MEANING * num_meanings)
        ranking = await judge.rank(list(found.values()), merge_at, temperature)
        sources = [candidate["source"] for candidate in ranking["candidates"]]
        if (sources.count("llm") >= num_meanings and sources[0] != "name") or num_meanings == 0:
            break
    return {
        "class_name": class_name,
        **ranking,
        "context": context,
        "num_images": num_images,
        "num_refused": answers.refused,
        "raw_answers": answers.raw,
    }


def _none(name: str) -> list[Candidate]:
    return []


def _given(meanings: Sequence[str], senses: Sequence[Candidate]) -> dict[str, Candidate]:
    """The user's and the lexicon's candidates, by their phrase's key."""
    found: dict[str, Candidate] = {}
    for phrase in meanings:
        cleaned = clean_phrase(phrase)
        if not cleaned:
            raise UserError(f"meaning {phrase!r} cannot be used: give at most 12 plain words")
        found.setdefault(phrase_key(cleaned), Candidate(cleaned, "user"))
    for sense in senses:
        found.setdefault(phrase_key(sense.meaning), sense)
    return found


class _Answers:
    """What the LLM said so far: its phrases among the candidates `found`, and its raw answers."""

    def __init__(
        self,
        class_name: str,
        context: str | None,
        models: Models,
        *,
        seed: int,
        found: dict[str, Candidate],
    ) -> None:
        self.class_name, self.context, self.models = class_name, context, models
        self.seed, self.found = seed, found
        self.raw: list[str] = []
        self.refused = 0

    async def ask(self, count: int) -> None:
        """Ask so many questions at once, and take in what is usable of the answers."""
        turns = range(len(self.raw), len(self.raw) + count)
        questions = [meaning_question(self.class_name, turn=t, context=self.context) for t in turns]
        answers = await asyncio.gather(
            *(
                self.models.complete(
                    question,
                    few_shot_seed(self.seed, self.class_name, "meaning", turn),
                    max_new_tokens=16,
                    temperature=0.8,
                    stop=("\n\n",),
                )
                for turn, question in zip(turns, questions, strict=True)
            )
        )
        for question, answer in zip(questions, answers, strict=True):
            self.raw.append(answer)
            phrases, bad = parse_meanings(with_cue(question.cue, answer), self.class_name)
            self.refused += bad
            for phrase in phrases:
                known = self.found.setdefault(phrase_key(phrase), Candidate(phrase, "llm"))
                self.found[phrase_key(phrase)] = replace(known, answers=known.answers + 1)


class _Judge:
    """What images, text encoder and LLM say of candidates; each is asked once about a phrase."""

    def __init__(
        self,
        class_name: str,
        context: str | None,
        models: Models,
        images: np.ndarray | None,
        background: Background | None,
    ) -> None:
        self.class_name, self.context, self.models = class_name, context, models
        self.images, self.background = images, background
        self.features: dict[str, np.ndarray] = {}  # by text
        self.logits: dict[str, float] = {}  # by meaning

    async def rank(
        self, candidates: list[Candidate], merge_at: float, temperature: float
    ) -> dict[str, Any]:
        """The ranking of the candidates left after merging; see `rank_meanings`."""
        kept, features, context_logits = await self._see(candidates, merge_at=merge_at)
        return rank_meanings(
            kept,
            np.zeros((0, features.shape[-1])) if self.images is None else self.images,
            features,
            background=self.background,
            context_logits=context_logits,
            temperature=temperature,
        )

    async def _see(
        self, candidates: list[Candidate], *, merge_at: float
    ) -> tuple[list[Candidate], np.ndarray, np.ndarray | None]:
        """The candidates left after merging, their text features, and their context's logits."""
        new = [candidate for candidate in candidates if candidate.read not in self.features]
        if new:
            texts = [text for candidate in new for text in candidate_texts(candidate)]
            embedded = np.asarray(await self.models.embed_texts(texts))
            rows = embedded.reshape(len(new), len(TEMPLATES), -1)
            self.features |= {c.read: row for c, row in zip(new, rows, strict=True)}
        features = np.stack([self.features[candidate.read] for candidate in candidates])
        kept, _ = merge_alike(candidates, unit_means(features), at=merge_at)
        features = np.stack([self.features[candidate.read] for candidate in kept])
        if not self.context:
            return kept, features, None
        # What a context itself says would follow from it whatever else is true: it is as likely as the
        # best of the others.
        others = [c for c in kept if c.source != "user" or c.meaning not in self.context]
        await self._weigh(
            [candidate for candidate in others if candidate.meaning not in self.logits]
        )
        best = max((self.logits[candidate.meaning] for candidate in others), default=0.0)
        logits = np.array([self.logits.get(candidate.meaning, best) for candidate in kept])
        return kept, features, (logits - logits.max()).clip(-MOST_CONTEXT / CONTEXT_NATS)

    async def _weigh(self, candidates: list[Candidate]) -> None:
        """Log-likelihood ratios of the context, in units of `CONTEXT_NATS`.

        Two estimates are added up: how much likelier the context makes the phrase after the name,
        and how likely the context is after the phrase. On 35 made-up questions with two or three
        senses (SmolLM2-135M) the first was right 28 times, the second 33 and their sum 35.
        """
        phrases = [with_article(c.meaning) if c.source == "name" else c.meaning for c in candidates]
        if not phrases:
            return
        n = len(phrases)
        prompts = [
            *([context_question(self.class_name, self.context)] * n),
            *([context_question(self.class_name, None)] * n),
            *(f"{phrase[0].upper()}{phrase[1:]} is" for phrase in phrases),
        ]
        ask = self.models.likelihood
        scores = (
            await ask(prompts, [*phrases, *phrases, *[self.context or ""] * n]) if ask else None
        )
        if scores is None:
            logits = await self._likeness(phrases)
        else:
            given, alone, reverse = np.array(scores).reshape(3, n)
            logits = (given - alone + reverse) / CONTEXT_NATS
        self.logits |= {c.meaning: float(x) for c, x in zip(candidates, logits, strict=True)}

    async def _likeness(self, phrases: list[str]) -> np.ndarray:
        """Where the LLM does not say: similarity of phrase and context to the text encoder."""
        rows = np.asarray(await self.models.embed_texts([*phrases, self.context or ""]))
        return (rows[:-1] @ rows[-1]) * LIKENESS_NATS / CONTEXT_NATS
