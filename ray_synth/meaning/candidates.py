"""The meanings that a class name may have: asked of a language model, merged where they are alike.

Names and contexts go in as few-shot questions; phrases come out as candidates for `ambiguity`.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_synth.meaning.answers import ARTICLES
from ray_synth.meaning.few_shot import FewShot
from ray_synth.meaning.names import plain_name

# The paper embeds the phrases; it names no template. Ours average several, as CLIP's zero-shot
# classification does, and hold the phrase alone: with the class name beside it, right and wrong
# phrases came 3 times closer together (the number of the digit against the next one, embedded CLIP).
TEMPLATES = ("an image of {}", "a good photo of {}")

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
IN_CONTEXT: tuple[tuple[str, str], ...] = (
    ("pen, from a list of things on a farm", "a fenced place where animals are kept"),
    ("q, from a list of letters", "the letter Q"),
    ("letter, from a list of things in an office", "a written message sent by post"),
    ("organ, from a list of musical instruments", "a large instrument with pipes"),
)
MOST_SIBLINGS = 8  # class names of the same data set that a question mentions


@dataclass(frozen=True)
class Candidate:
    """A meaning that a class name may have.

    Attributes:
        meaning: the phrase, for prompts.
        source: "llm", "user", "lexicon", or "name" for the bare class name.
        answers: how many of the LLM's answers gave it, or a phrase merged into it.
        merged: phrases that mean the same.
        text: the whole of it, for the text encoder, where the phrase is a part; "" is the phrase.
        thing: whether an image can be of it, as far as is known.
    """

    meaning: str
    source: str
    answers: int = 0
    merged: tuple[str, ...] = ()
    text: str = ""
    thing: bool = True

    @property
    def read(self) -> str:
        """What the text encoder reads of it."""
        return self.text or self.meaning


def meaning_question(class_name: str, *, turn: int, context: str | None = None) -> FewShot:
    """The few-shot prompt for one meaning; turns go round the kinds of sense.

    With a context every other turn asks for the sense that the context speaks of.
    """
    name = plain_name(class_name)
    if context and turn % 2 == 0:
        return context_question(name, context)
    turn = turn // 2 if context else turn
    kind, article = KINDS[turn % len(KINDS)]
    return FewShot(TASK, EXAMPLES, f"{name}, {kind}", ("Word", "Meaning"), article)


def context_question(class_name: str, context: str | None) -> FewShot:
    """The question whose answers are scored by the context: with it, or with none at all."""
    name = plain_name(class_name)
    if context:
        return FewShot(TASK, IN_CONTEXT, f"{name}, {context}", ("Word", "Meaning"))
    alone = tuple((question.partition(",")[0], answer) for question, answer in IN_CONTEXT)
    return FewShot(TASK, alone, name, ("Word", "Meaning"))


def siblings_context(class_name: str, class_names: Sequence[str]) -> str | None:
    """ "from a list with heron, stork": what the other classes of a data set say of this one."""
    siblings = (plain_name(name) for name in class_names if name != class_name)
    others = list(itertools.islice(siblings, MOST_SIBLINGS))
    return f"from a list with {', '.join(others)}" if others else None


def candidate_texts(candidate: Candidate) -> list[str]:
    """What the text encoder reads of a candidate: one text per template."""
    bare = candidate.source == "name"
    phrase = with_article(candidate.meaning) if bare else candidate.read
    return [template.format(phrase) for template in TEMPLATES]


def merge_alike(
    candidates: Sequence[Candidate], features: np.ndarray, *, at: float
) -> tuple[list[Candidate], np.ndarray]:
    """Put the LLM's phrases that mean the same into one candidate.

    Only the LLM's phrases are merged, into each other or into those of a user or a lexicon, which
    were given as distinct. The phrase that most answers gave stands for the rest.

    Args:
        candidates: in any order.
        features: (num_candidates, dim) unit rows of their texts.
        at: cosine similarity from which on two phrases are alike.

    Returns:
        What is left, in the order given, and its rows of `features`.
    """
    order = sorted(
        range(len(candidates)),
        key=lambda i: (candidates[i].source == "llm", -candidates[i].answers, i),
    )
    kept: dict[int, Candidate] = {}
    for i in order:
        candidate = candidates[i]
        rivals = [j for j, other in kept.items() if other.source != "name"]
        if candidate.source == "llm" and rivals:
            likeness = features[rivals] @ features[i]
            best = rivals[int(likeness.argmax())]
            if likeness.max() >= at:
                kept[best] = replace(
                    kept[best],
                    answers=kept[best].answers + candidate.answers,
                    merged=(*kept[best].merged, candidate.meaning),
                )
                continue
        kept[i] = candidate
    left = sorted(kept)
    return [kept[i] for i in left], features[left]


def with_cue(cue: str, answer: str) -> str:
    """The answer with the cue in front, unless the model wrote an opening of its own."""
    first = next(iter(answer.split()), "")
    listed = re.match(r"\W|\d+[.)]", first)
    if not cue or not first or listed or first.casefold() in ARTICLES:
        return answer
    return f"{cue} {answer.strip()}"


def few_shot_seed(seed: int, class_name: str, purpose: str, number: int) -> int:
    """A 48-bit seed for one question: the same everywhere, whatever else is asked beside it."""
    digest = hashlib.sha256(f"{seed}:{class_name}:{purpose}:{number}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def with_article(name: str) -> str:
    """ "a crane", "an owl"; names that have an article, are proper or plural stay as they are."""
    name = plain_name(name).strip()
    if re.match(r"(?i)(an?|the)\s", name) or name[:1].isupper() or re.search(r"[^su]s$", name):
        return name
    return f"{'an' if re.match(r'[aeiou]', name) else 'a'} {name}"
