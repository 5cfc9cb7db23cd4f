"""Contextual prompts (the paper's CD): scenes that an LLM writes for a class, and their prompts.

A class name and its meaning go in, contexts with their source come out; the built-in pool fills up
what the LLM leaves short.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import yaml

from ray_synth.meaning.answers import ARTICLES, FIELDS, parse_scene_phrases, phrase_key
from ray_synth.meaning.candidates import few_shot_seed
from ray_synth.meaning.few_shot import FewShot
from ray_synth.meaning.names import plain_name
from ray_synth.prompting.fitting import fit_prompt, subject
from ray_synth.storage.folder import Folder

PHOTO = "a photo of {subject}"
PHRASES_AN_ANSWER = 3  # in each worked example
USES_OF_A_PHRASE = 2  # contexts that may share a foreground or a background of the LLM's
RARE_USES = 4  # the same for a light or a camera angle, of which there are fewer

TASK = "Ideas for photographs of a subject."
LABELS = {
    "foreground": "Foreground",
    "background": "Background",
    "lighting": "Lighting",
    "camera_angle": "Camera angle",
}
# subject -> phrases for each field: a thing, a sign, a creature
EXAMPLES: dict[str, dict[str, str]] = {
    "a teapot, a pot for making tea": {
        "foreground": "beside a stack of cups; next to a bowl of lemons; under a paper lamp",
        "background": "on a kitchen table; in a small shop; on a stone terrace",
        "lighting": "in soft morning light; in bright daylight; by candlelight",
        "camera_angle": "close-up; from above; at eye level",
    },
    "an arrow, a sign that points the way": {
        "foreground": "painted in white; written in chalk; glowing in red",
        "background": "on a blackboard; on a brick wall; on a road sign",
        "lighting": "under a cloudy sky; at night; in dim light",
        "camera_angle": "filling the frame; tilted; from close up",
    },
    "an owl, a bird that hunts at night": {
        "foreground": "on a mossy branch; behind a wooden fence; above tall grass",
        "background": "in a dark forest; on a quiet farm; in front of a barn",
        "lighting": "under moonlight; at dusk; in golden light",
        "camera_angle": "front view; macro shot; from above",
    },
}


def kept_contexts(run: Folder) -> dict[str, Any]:
    """What contexts.json has of each class, by name; empty where a run has none."""
    return run.read_json("contexts.json")["classes"] if run.exists("contexts.json") else {}


@dataclass(frozen=True)
class Context:
    """A scene to put a class in; any field may be empty.

    Attributes:
        foreground: an object near the subject, or what the subject is made of.
        background: the place or surface behind it.
        lighting: the light.
        camera_angle: where the camera stands.
    """

    foreground: str = ""
    background: str = ""
    lighting: str = ""
    camera_angle: str = ""

    def phrases(self) -> list[str]:
        """The fields that are not empty, in order."""
        return [phrase for phrase in asdict(self).values() if phrase]


@dataclass(frozen=True)
class ContextResult:
    """The contexts of a class.

    Attributes:
        contexts: pairs of a context and its source, "llm" or "pool".
        raw: every answer of the LLM, as it came.
        refused: pieces of answers that were not usable.
    """

    contexts: list[tuple[Context, str]]
    raw: list[str]
    refused: int

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


@cache
def load_pool() -> Pool:
    """The built-in pool."""
    text = (resources.files("ray_synth.prompting") / "contexts.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    return Pool(
        tuple((tuple(s["foregrounds"]), tuple(s["backgrounds"])) for s in data["scenes"]),
        tuple(data["lightings"]),
        tuple(data["camera_angles"]),
    )


def context_question(class_name: str, meaning: str, field: str) -> FewShot:
    """The few-shot prompt for phrases of one field of a scene."""
    return FewShot(
        TASK,
        tuple((example, phrases[field]) for example, phrases in EXAMPLES.items()),
        subject(plain_name(class_name), plain_name(meaning) if meaning else ""),
        ("Subject", LABELS[field]),
    )


async def write_contexts(
    class_name: str,
    meaning: str,
    *,
    complete: Callable[..., Awaitable[str]],
    num_contexts: int,
    retries: int = 2,
    seed: int = 0,
) -> ContextResult:
    """Contexts for a class: the LLM's, and where those are too few, the pool's.

    The LLM is asked for foregrounds, backgrounds, lights and camera angles, each on its own: a
    small model keeps to one subject matter at a time. Its phrases are then combined.

    Args:
        complete: answers a `FewShot` and a seed, with generation options by keyword.
        num_contexts: how many to return; fewer only if the pool runs dry.
        retries: further rounds of asking, with new seeds, for fields that lack phrases.
    """
    found: dict[str, dict[str, str]] = {field: {} for field in FIELDS}
    raw: list[str] = []
    refused = 0
    for turn in range(retries + 1):
        asked = [
            field
            for field in FIELDS
            for _ in range(-(-_lacking(found, field, num_contexts) // PHRASES_AN_ANSWER))
        ]
        answers = await asyncio.gather(
            *(
                complete(
                    context_question(class_name, meaning, field),
                    few_shot_seed(seed, class_name, f"context {turn}", number),
                    max_new_tokens=24,
                    temperature=0.8,
                    stop=("\n\n",),
                )
                for number, field in enumerate(asked)
            )
        )
        for field, answer in zip(asked, answers, strict=True):
            raw.append(answer)
            phrases, bad = parse_scene_phrases(answer, field, subject(class_name, meaning))
            refused += bad
            for phrase in phrases:
                found[field].setdefault(phrase_key(phrase), as_setting(field, phrase))
    written = combine(
        {field: list(phrases.values()) for field, phrases in found.items()},
        num_contexts,
        seed=few_shot_seed(seed, class_name, "combine", 0),
    )
    drawn = load_pool().draw(
        num_contexts - len(written),
        seed=few_shot_seed(seed, class_name, "pool", 0),
        taken=written,
    )
    sources = [(context, "llm") for context in written] + [(context, "pool") for context in drawn]
    return ContextResult(sources, raw, refused)


def combine(phrases: dict[str, list[str]], number: int, *, seed: int) -> list[Context]:
    """At most `number` distinct contexts of the phrases of each field, all used about equally.

    No foreground and background come together more than once, and neither is used more than
    `USES_OF_A_PHRASE` times; without either there are no contexts.
    """
    rng = np.random.default_rng(seed)
    front, back = phrases.get("foreground", []), phrases.get("background", [])
    pairs = [(a, b) for a in front or [""] for b in back or [""] if phrase_key(a) != phrase_key(b)]
    lights = _cycle(phrases.get("lighting", []), number, rng)
    angles = _cycle(phrases.get("camera_angle", []), number, rng)
    uses: Counter[str] = Counter()
    contexts: list[Context] = []
    for at in rng.permutation(len(pairs)):
        if len(contexts) == number:
            break
        pair = [phrase for phrase in pairs[at] if phrase]
        if all(uses[phrase] < USES_OF_A_PHRASE for phrase in pair):
            uses.update(pair)
            turn = len(contexts)
            foreground, background = pairs[at]
            contexts.append(Context(foreground, background, lights[turn], angles[turn]))
    return contexts


def _cycle(values: Sequence[str], number: int, rng: np.random.Generator) -> list[str]:
    """`number` entries in shuffled passes over the values; empty texts where there are none."""
    if not values:
        return [""] * number
    passes = [rng.permutation(len(values)) for _ in range(-(-number // len(values)))]
    return [values[i] for i in np.concatenate(passes)[:number]] if passes else []


def as_setting(field: str, phrase: str) -> str:
    """A bare thing as a part of the scene, so that it does not read as a second subject."""
    thing = phrase.split(maxsplit=1)[0].casefold() in ARTICLES
    if thing and field in ("foreground", "lighting"):
        return f"with {phrase}"
    return f"in front of {phrase}" if thing and field == "background" else phrase


def context_key(context: Context) -> tuple[str, ...]:
    """What makes two contexts the same: case, punctuation and articles do not count."""
    return tuple(phrase_key(phrase) for phrase in asdict(context).values())


def _lacking(found: dict[str, dict[str, str]], field: str, num_contexts: int) -> int:
    uses = USES_OF_A_PHRASE if field in ("foreground", "background") else RARE_USES
    return max(0, -(-num_contexts // uses) - len(found[field]))


def plain_prompt(class_name: str, meaning: str, **limit: Any) -> str:
    """The subject alone, for the ablation without contexts and styles.

    Args:
        limit: `count_tokens`, `max_tokens` and `lost` of `fit_prompt`.
    """
    return fit_prompt(PHOTO, class_name, meaning, [], **limit)


def contextual_prompt(class_name: str, meaning: str, context: Context, **limit: Any) -> str:
    """The subject first, then as much of its context as the text encoder can read."""
    return fit_prompt(PHOTO, class_name, meaning, context.phrases(), **limit)
