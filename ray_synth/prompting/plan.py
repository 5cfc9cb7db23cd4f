"""The plan: one row per image to make, from classes, meanings, contexts and styles. Pure; no Ray.

Row r of a class depends on the seed, the class and r alone, and each round takes every class once in
a shuffled order: any prefix is balanced over classes, and the plan for 1x is the first sixth of 6x.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from ray_synth.generation.store import PLAN_SCHEMA
from ray_synth.prompting.contexts import Context, contextual_prompt, plain_prompt
from ray_synth.prompting.styles import Style, stylized_prompt

KINDS = ("plain", "contextual", "stylized")


@dataclass(frozen=True)
class ClassPrompts:
    """What is known about a class when its prompts are written.

    Attributes:
        meaning: the resolved meaning; the class name itself where none was resolved.
        contexts: the scenes to place it in, each with where it came from (llm | pool).
    """

    class_index: int
    class_name: str
    meaning: str
    contexts: Sequence[tuple[Context, str]]


def make_plan(
    classes: Sequence[ClassPrompts],
    *,
    num_images: int,
    mix: dict[str, float],
    styles: Sequence[Style],
    negative_prompt: str,
    fingerprint: str,
    seed: int,
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> pa.Table:
    """The plan table (schema `PLAN_SCHEMA`), of exactly `num_images` rows.

    Args:
        mix: share of each kind of prompt; kept in every prefix of each class, as near as can be.
        fingerprint: of the generator, part of each row's id.
        count_tokens: of the generator's text encoder; prompts stay within `max_tokens`.
    """
    columns: dict[str, list] = {name: [] for name in PLAN_SCHEMA.names}
    prompts: dict[tuple[str, ...], str] = {}
    for round_number, (kind, turn) in enumerate(kinds(-(-num_images // len(classes)), mix)):
        order = np.random.default_rng((seed, round_number)).permutation(len(classes))
        for position in order[: num_images - len(columns["seed"])]:
            row = _row(
                classes[position],
                kind,
                turn,
                image_seed=_digest_int(seed, classes[position].class_index, round_number),
                styles=styles,
                negative_prompt=negative_prompt,
                fingerprint=fingerprint,
                seed=seed,
                limit={"count_tokens": count_tokens, "max_tokens": max_tokens},
                written=prompts,
            )
            for name, value in row.items():
                columns[name].append(value)
    table = pa.Table.from_pydict(columns, schema=PLAN_SCHEMA)
    assert len(set(table["sample_id"].to_pylist())) == table.num_rows == num_images
    return table


def _row(
    known: ClassPrompts,
    kind: str,
    turn: int,
    *,
    image_seed: int,
    styles: Sequence[Style],
    negative_prompt: str,
    fingerprint: str,
    seed: int,
    limit: dict,
    written: dict[tuple[str, ...], str],
) -> dict[str, object]:
    context, source = Context(), "none"
    if kind != "plain" and known.contexts:
        at = _cycle_position(turn, len(known.contexts), (seed, known.class_index, 1))
        context, source = known.contexts[at]
    style = None
    if kind == "stylized":
        style = styles[_cycle_position(turn, len(styles), (seed, known.class_index, 2))]
    name, meaning = known.class_name, known.meaning
    key = (kind, style.name if style else "", name, meaning, repr(context))
    if key not in written:
        if style:
            written[key] = stylized_prompt(style, name, meaning, context, **limit)
        elif kind == "contextual":
            written[key] = contextual_prompt(name, meaning, context, **limit)
        else:
            written[key] = plain_prompt(name, meaning, **limit)
    return {
        "sample_id": sample_id(written[key], negative_prompt, image_seed, fingerprint),
        "class_index": known.class_index,
        "class_name": name,
        "meaning": meaning,
        "kind": kind,
        "style": style.name if style else "",
        "prompt": written[key],
        "negative_prompt": negative_prompt,
        "context_source": source,
        "seed": image_seed,
    }


def sample_id(prompt: str, negative_prompt: str, seed: int, fingerprint: str) -> str:
    """Hex digest of what makes an image."""
    text = "\x1f".join([prompt, negative_prompt, str(seed), fingerprint])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def kinds(rounds: int, mix: dict[str, float]) -> Iterator[tuple[str, int]]:
    """The kind of each of a class's images, and how many of that kind came before it.

    Each round goes to the kind that is furthest behind its share, so that every prefix is mixed.
    """
    total = sum(mix.values())
    shares = {kind: mix[kind] / total for kind in KINDS if mix.get(kind, 0) > 0}
    counts = dict.fromkeys(shares, 0)
    for done in range(rounds):
        kind = max(shares, key=lambda k: shares[k] * (done + 1) - counts[k])
        yield kind, counts[kind]
        counts[kind] += 1


def _cycle_position(turn: int, length: int, key: tuple[int, ...]) -> int:
    """Entry `turn` of endless shuffled passes over `length` items: all are used equally often."""
    number, offset = divmod(turn, length)
    return int(_permutation(length, (*key, number))[offset])


@lru_cache(maxsize=100_000)
def _permutation(length: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).permutation(length)


def _digest_int(*parts: int) -> int:
    """A 48-bit seed: unlike a hash of Python's, the same everywhere."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")
