"""Contextual prompts (the paper's CD): scenes that an LLM writes for a class, and their prompts.

A class name and its meaning go in, contexts with their source come out; the built-in pool fills up
what the LLM leaves short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ray_synth.meaning.ambiguity import few_shot_seed, with_article
from ray_synth.meaning.answers import Context, context_key, parse_contexts, phrase_key
from ray_synth.meaning.llm import FewShot

PHOTO = "a photo of {subject}"
SCENES_AN_ANSWER = 3  # lines that each worked example shows

TASK = (
    "Describe scenes for photographs of a subject. Each line is one scene: "
    "what is in the foreground; the background; the light; the camera angle."
)
EXAMPLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "a teapot, a pot for making tea",
        (
            "beside a stack of cups; on a kitchen table; in soft morning light; close-up",
            "next to a bowl of lemons; on a stone terrace; in bright daylight; from above",
            "under a paper lamp; in a small shop; in warm evening light; at eye level",
        ),
    ),
    (
        "a heart, a red shape that stands for love",
        (
            "painted in red; on a brick wall; in dim light; tilted",
            "drawn with a finger; on a sandy beach; at sunset; from above",
            "cut out of paper; on a wooden desk; in soft light; close-up",
        ),
    ),
    (
        "an arrow, a sign that points the way",
        (
            "painted in white; on a black road; under a cloudy sky; low angle",
            "written in chalk; on a blackboard; in even light; at eye level",
            "glowing in neon; on a dark street; at night; wide shot",
        ),
    ),
    (
        "an owl, a bird that hunts at night",
        (
            "on a mossy branch; in a dark forest; under moonlight; from below",
            "behind a wooden fence; on a quiet farm; at dusk; wide shot",
            "above tall grass; in an open field; in golden light; side view",
        ),
    ),
)


@dataclass(frozen=True)
class ContextResult:
    """The contexts of a class.

    Attributes:
        contexts: pairs of a context and its source, "llm" or "pool".
        raw: every answer of the LLM, as it came.
        refused: pieces of answers that were not usable.
    """

    contexts: list[tuple[Context, str]]
    raw: list[str] = field(default_factory=list)
    refused: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: `{contexts: [{context, source}], raw, refused}`."""
        contexts = [
            {"context": asdict(context), "source": source} for context, source in self.contexts
        ]
        return {"contexts": contexts, "raw": self.raw, "refused": self.refused}


@dataclass(frozen=True)
class Pool:
    """Built-in phrases to make contexts of, for any class.

    Attributes:
        scenes: pairs of foregrounds and backgrounds that go together.
        lightings: phrases for the light.
        camera_angles: phrases for the camera.
    """

    scenes: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    lightings: tuple[str, ...]
    camera_angles: tuple[str, ...]

    def draw(self, number: int, *, seed: int, taken: Sequence[Context] = ()) -> list[Context]:
        """Contexts that differ from one another and from those taken; fewer if the pool is dry."""
        rng = np.random.default_rng(seed)
        seen = {context_key(context) for context in taken}
        drawn: list[Context] = []
        for _ in range(50 * number):
            if len(drawn) == number:
                break
            foregrounds, backgrounds = self.scenes[rng.integers(len(self.scenes))]
            context = Context(
                str(rng.choice(foregrounds)),
                str(rng.choice(backgrounds)),
                str(rng.choice(self.lightings)),
                str(rng.choice(self.camera_angles)),
            )
            if context_key(context) not in seen:
                seen.add(context_key(context))
                drawn.append(context)
        return drawn


def load_pool(path: str | Path | None = None) -> Pool:
    """The pool of a YAML file, or the built-in one.

    The file has `scenes` (a list of `{foregrounds, backgrounds}`), `lightings`, `camera_angles`.

    Raises:
        ValueError: the file is missing or not of that shape.
    """
    return _parse_pool(None if path is None else str(path))


@lru_cache(maxsize=4)
def _parse_pool(path: str | None) -> Pool:
    if path is None:
        text = (resources.files("ray_synth.prompting") / "contexts.yaml").read_text("utf-8")
    elif Path(path).is_file():
        text = Path(path).read_text("utf-8")
    else:
        raise ValueError(f"no such file of contexts: {path}")
    try:
        data = yaml.safe_load(text)
        return Pool(
            tuple((_texts(s["foregrounds"]), _texts(s["backgrounds"])) for s in data["scenes"]),
            _texts(data["lightings"]),
            _texts(data["camera_angles"]),
        )
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"contexts file {path or 'contexts.yaml'}: needs scenes (a list of foregrounds and "
            f"backgrounds), lightings and camera_angles, each a list of texts: {error}"
        ) from None


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"not a list of texts: {value!r}")
    return tuple(value)


def context_question(class_name: str, meaning: str, *, seed: int) -> FewShot:
    """The few-shot prompt for scenes of a class; the seed turns the order of the examples."""
    order = np.random.default_rng(seed).permutation(len(EXAMPLES))
    rng = np.random.default_rng((seed, 1))
    examples = [(EXAMPLES[i][0], list(EXAMPLES[i][1])) for i in order]
    for _, lines in examples:
        rng.shuffle(lines)
    return FewShot(
        TASK,
        tuple((name, "\n" + "\n".join(lines)) for name, lines in examples),
        subject(class_name, meaning),
        ("Subject", "Scenes"),
        "\n",
    )


async def write_contexts(
    class_name: str,
    meaning: str,
    *,
    complete: Callable[..., Awaitable[str]],
    num_contexts: int,
    retries: int = 2,
    seed: int = 0,
    pool: Pool | None = None,
) -> ContextResult:
    """Contexts for a class: the LLM's, and where those are too few, the pool's.

    Args:
        complete: answers a `FewShot` and a seed, with generation options by keyword.
        num_contexts: how many to return; fewer only if the pool runs dry.
        retries: further rounds of asking, with new seeds, while there are too few.
        pool: None is the built-in one.
    """
    found: dict[tuple[str, ...], Context] = {}
    raw: list[str] = []
    refused = asked = 0
    for _ in range(retries + 1):
        lacking = num_contexts - len(found)
        if lacking <= 0:
            break
        questions = -(-lacking // SCENES_AN_ANSWER)
        seeds = [few_shot_seed(seed, class_name, "context", asked + i) for i in range(questions)]
        asked += questions
        answers = await asyncio.gather(
            *(
                complete(
                    context_question(class_name, meaning, seed=s),
                    s,
                    max_new_tokens=24 * SCENES_AN_ANSWER,
                    temperature=0.8,
                    stop=("\n\n",),
                )
                for s in seeds
            )
        )
        for answer in answers:
            raw.append(answer)
            contexts, bad = parse_contexts(answer)
            refused += bad
            for context in contexts:
                found.setdefault(context_key(context), context)
    written = list(found.values())[:num_contexts]
    drawn = (pool or load_pool()).draw(
        num_contexts - len(written),
        seed=few_shot_seed(seed, class_name, "pool", 0),
        taken=written,
    )
    sources = [(context, "llm") for context in written] + [(context, "pool") for context in drawn]
    return ContextResult(sources, raw, refused)


def subject(class_name: str, meaning: str) -> str:
    """How a prompt names a class: "a crane, a large wading bird".

    The paper appends the meaning to the name. Where the meaning already says the name ("the number
    seven"), the name is not said twice.
    """
    name = " ".join(class_name.replace("_", " ").split())
    meaning = " ".join(meaning.split())
    if not meaning or phrase_key(meaning) == phrase_key(name):
        return with_article(name)
    if f" {phrase_key(name)} " in f" {phrase_key(meaning)} ":
        return meaning
    return f"{with_article(name)}, {meaning}"


def plain_prompt(
    class_name: str, meaning: str, *, count_tokens: Callable[[str], int], max_tokens: int
) -> str:
    """The subject alone, for the ablation without contexts and styles."""
    return fit_prompt(
        PHOTO, class_name, meaning, [], count_tokens=count_tokens, max_tokens=max_tokens
    )


def contextual_prompt(
    class_name: str,
    meaning: str,
    context: Context,
    *,
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> str:
    """The subject first, then as much of its context as the text encoder can read."""
    return fit_prompt(
        PHOTO,
        class_name,
        meaning,
        context.phrases(),
        count_tokens=count_tokens,
        max_tokens=max_tokens,
    )


def fit_prompt(
    template: str,
    class_name: str,
    meaning: str,
    phrases: Sequence[str],
    *,
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> str:
    """A prompt of at most `max_tokens` tokens, start and end marks included.

    Phrases that do not fit are left out, later ones first to go; then the meaning loses words from
    its end. The name itself always stays.
    """
    words = meaning.split()
    for end in range(len(words), -1, -1):
        prompt = template.replace(
            "{subject}", subject(class_name, " ".join(words[:end]).rstrip(" ,"))
        )
        if count_tokens(prompt) <= max_tokens:
            break
    for phrase in phrases:
        longer = f"{prompt}, {phrase}"
        if count_tokens(longer) <= max_tokens:
            prompt = longer
    return prompt


__all__ = [
    "Context",
    "ContextResult",
    "Pool",
    "context_question",
    "contextual_prompt",
    "fit_prompt",
    "load_pool",
    "plain_prompt",
    "subject",
    "write_contexts",
]
