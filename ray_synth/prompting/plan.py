"""The plan: one row per image to make, from classes, meanings, contexts and styles. Pure; no Ray.

Row r of a class depends on the seed, the class's number and r alone, and each round takes every class
once in a shuffled order: any prefix is balanced over classes, and the plan for 1x is the first sixth of
6x.
Where classes have budgets of their own, a prefix has of each what its share of the plan is.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ray_synth.prompting.contexts import Context, contextual_prompt, plain_prompt
from ray_synth.prompting.plan_file import PLAN_SCHEMA
from ray_synth.prompting.plan_index import id_keys
from ray_synth.prompting.styles import Style, stylized_prompt

KINDS = ("plain", "contextual", "stylized")
TABLE_ROWS = 65_536
# Enough for 1,000 classes in 16 contexts and 60 styles (0.3 GB); it takes a tokenizer to make one.
PROMPTS_KEPT = 2**20


@dataclass(frozen=True)
class ClassPrompts:
    """What is known about a class when its prompts are written.

    Attributes:
        meaning: the resolved meaning; the class name itself where none was resolved.
        contexts: the scenes to place it in, each with where it came from (llm | pool).
        references: ids of real images; where there are any, each row is guided by one of them.
        number: decides its seeds and its order of contexts and styles; default: its class index.
            A class that moves to another index keeps its number, and so its images.
        said: what prompts call it; default: its name.
        context_draws: how often each context comes, relative to each other; empty: all equally often.
        unlike: what it is taken for and is not (`a heron`): half of the rows say so.
    """

    class_index: int
    class_name: str
    meaning: str
    contexts: Sequence[tuple[Context, str]]
    references: Sequence[str] = ()
    number: int | None = None
    said: str = ""
    context_draws: Sequence[int] = ()
    unlike: str = ""

    @property
    def key(self) -> int:
        return self.class_index if self.number is None else self.number


def make_plan(classes: Sequence[ClassPrompts], **arguments: Any) -> pa.Table:
    """The whole plan in memory; the arguments are those of `plan_tables`."""
    return pa.concat_tables([PLAN_SCHEMA.empty_table(), *plan_tables(classes, **arguments)])


def plan_tables(
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
    budgets: np.ndarray | None = None,
    style_draws: Sequence[int] = (),
    table_rows: int = TABLE_ROWS,
    shortened: Counter[str] | None = None,
    number: int = 0,
    before: np.ndarray | None = None,
    unlike_in_words: bool = False,
) -> Iterator[pa.Table]:
    """The plan of exactly `num_images` rows, in tables (schema `PLAN_SCHEMA`) of `table_rows`.

    Memory holds one table, 8 bytes per row, and caches of a bounded size: ten million rows of 1,000
    classes take 0.6 GB and two minutes.

    Args:
        mix: share of each kind of prompt; kept in every prefix of each class, as near as can be.
        fingerprint: of the generator, part of each row's id.
        count_tokens: of the generator's text encoder; prompts stay within `max_tokens`.
        budgets: (num_classes,) images of each class, `num_images` in all; None: the same for each.
        style_draws: how often each style comes, relative to each other; empty: all equally often.
        table_rows: the last table may have fewer.
        shortened: counts rows by what their prompt lost (`fit_prompt`), as they are yielded.
        number: of the round of practice that the plan is of (`rounds.py`).
        before: (num_classes,) rows of each class in earlier rounds, which its own go on from.
        unlike_in_words: `ClassPrompts.unlike` is said in the prompt, not in the negative one.
    """
    prompts = _Prompts(classes, styles, count_tokens=count_tokens, max_tokens=max_tokens)
    prompts.negative, prompts.in_words = negative_prompt, unlike_in_words
    prompts.shortened = Counter() if shortened is None else shortened
    id_heads = np.empty(num_images, np.uint64)
    done = 0
    turns = _even_turns(len(classes), num_images) if budgets is None else _turns(budgets)
    of_styles = style_draws or [1] * len(styles)
    rounds = _rounds(classes, turns, mix=mix, style_draws=of_styles, seed=seed, number=number)
    for slots in _in_chunks(_first(rounds, num_images), table_rows):
        if before is not None:
            slots[-1] += before[slots[0]]
        table = _table(slots, classes, styles, prompts, fingerprint, seed)
        id_heads[done : done + table.num_rows] = id_keys(table["sample_id"].to_pylist())
        done += table.num_rows
        yield table
    id_heads.sort()
    assert done == num_images
    assert (id_heads[1:] != id_heads[:-1]).all(), "two rows of the plan have the same sample_id"


def _even_turns(num_classes: int, num_images: int) -> Iterator[np.ndarray]:
    """For each round the number of each class's row, in a round of all classes; cut at the end."""
    for number in range(-(-num_images // num_classes)):
        yield np.full(num_classes, number)


def _turns(budgets: np.ndarray) -> Iterator[np.ndarray]:
    """As `_even_turns`, -1 for a class that has no row in a round: they are spread evenly."""
    most = int(budgets.max(initial=0))
    before = np.zeros_like(budgets)
    for number in range(1, most + 1):
        after = budgets * number // most
        yield np.where(after > before, before, -1)
        before = after


def _rounds(
    classes: Sequence[ClassPrompts],
    turns: Iterable[np.ndarray],
    *,
    mix: dict[str, float],
    style_draws: Sequence[int],
    seed: int,
    number: int = 0,
) -> Iterator[np.ndarray]:
    """The rows in numbers, `(6, rows)` int64 per round.

    Each row has the position of its class, its kind, its context, style and reference (-1: none),
    and its number within its class.
    """
    contexts = [_deck(known.context_draws or [1] * len(known.contexts)) for known in classes]
    references = [_deck([1] * len(known.references)) for known in classes]
    own = (number,) if number else ()  # a later round shuffles anew
    keys = [(seed, known.key, *own) for known in classes]
    context_cycles = {kind: _Cycles(contexts, keys, 1) for kind in KINDS if kind != "plain"}
    style_cycles = _Cycles([_deck(style_draws)] * len(classes), keys, 2)
    reference_cycles = _Cycles(references, keys, 3)
    sequence = _Sequence(mix)
    for place, turn in enumerate(turns):
        order = np.random.default_rng((seed, place, *own)).permutation(len(classes))
        position = order[turn[order] >= 0]
        row = turn[position]
        kind, of_kind = sequence.at(row)
        columns = np.stack([position, kind, *np.full((3, len(position)), -1), row])
        for name, cycles in context_cycles.items():
            some = kind == KINDS.index(name)
            columns[2, some] = cycles.at(position[some], of_kind[some])
        some = kind == KINDS.index("stylized")
        columns[3, some] = style_cycles.at(position[some], of_kind[some])
        if any(known.references for known in classes):
            columns[4] = reference_cycles.at(position, row)
        yield columns


class _Sequence:
    """The kinds of a class's rows, one after the other, as far as they were asked for."""

    def __init__(self, mix: dict[str, float]) -> None:
        self._kinds = kinds(mix)
        self._known = np.zeros((2, 0), np.int64)

    def at(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The kinds (positions in `KINDS`) of some rows, and how many of their kind came before."""
        missing = int(rows.max(initial=-1)) + 1 - self._known.shape[1]
        if missing > 0:
            more = itertools.islice(self._kinds, max(missing, 1024))
            new = np.array([(KINDS.index(kind), turn) for kind, turn in more]).T
            self._known = np.concatenate([self._known, new], axis=1)
        kind, turn = self._known[:, rows]
        return kind, turn


def _deck(draws: Sequence[int]) -> list[np.ndarray]:
    """Passes over some items: one that is drawn half as often as others comes in every second pass.

    Where all are drawn equally often, that is one pass over all.
    """
    counts = np.array(draws, np.int64)
    if not len(counts):
        return [np.arange(0)]
    most = int(counts.max())
    if (counts == most).all():
        return [np.arange(len(counts))]
    # Items that are drawn equally often start at different passes, and so do not all come in one.
    ahead = np.arange(len(counts)) * 7919 % most
    done = [(counts * number + ahead) // most for number in range(most + 1)]
    return [np.flatnonzero(done[number + 1] > done[number]) for number in range(most)]


class _Cycles:
    """Endless shuffled passes over the items of each class, as its deck says (`_deck`).

    Holds one deck of each class, 4 bytes per item and pass.
    """

    def __init__(
        self, decks: Sequence[list[np.ndarray]], keys: Sequence[tuple[int, ...]], stream: int
    ) -> None:
        self._decks, self._keys, self._stream = decks, keys, stream
        lengths = np.array([sum(map(len, deck)) for deck in decks])
        self._empty = lengths == 0
        self._lengths = np.maximum(lengths, 1)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._pass = np.full(len(keys), -1)
        self._items = np.zeros(self._lengths.sum(), np.int32)

    def at(self, classes: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """The item of each of some classes at its turn, (n,); -1 where a class has none."""
        lengths = self._lengths[classes]
        numbers, offsets = np.divmod(turns, lengths)
        for at in np.flatnonzero((numbers != self._pass[classes]) & (lengths > 1)).tolist():
            i, number = int(classes[at]), int(numbers[at])
            start, length = self._starts[i], int(lengths[at])
            rng = np.random.default_rng((*self._keys[i], self._stream, number))
            shuffled = [items[rng.permutation(len(items))] for items in self._decks[i]]
            self._items[start : start + length] = np.concatenate(shuffled)
        self._pass[classes] = numbers
        return np.where(self._empty[classes], -1, self._items[self._starts[classes] + offsets])


def _first(rounds: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The first `count` columns."""
    for columns in rounds:
        yield columns[:, :count]
        count -= min(count, columns.shape[1])


def _in_chunks(rounds: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same columns in arrays of `size` columns; the last may have fewer."""
    held: list[np.ndarray] = []
    waiting = 0
    for columns in rounds:
        held.append(columns)
        waiting += columns.shape[1]
        if waiting >= size:
            joined = np.concatenate(held, axis=1)
            full = waiting - waiting % size
            yield from np.split(joined[:, :full], full // size, axis=1)
            held, waiting = [joined[:, full:]], waiting - full
    if waiting:
        yield np.concatenate(held, axis=1)


def _table(
    slots: np.ndarray,
    classes: Sequence[ClassPrompts],
    styles: Sequence[Style],
    prompts: _Prompts,
    fingerprint: str,
    seed: int,
) -> pa.Table:
    """The rows of some slots (columns of `_rounds`)."""
    position, kind, context, style, reference, row = slots
    known = [classes[i] for i in position.tolist()]
    seeds = [_digest_int(seed, k.key, r) for k, r in zip(known, row.tolist(), strict=True)]
    texts, negatives = prompts.told_apart(prompts.of(position, kind, context, style), known, seeds)
    references = [
        k.references[r] if r >= 0 else "" for k, r in zip(known, reference.tolist(), strict=True)
    ]
    sources = [
        k.contexts[c][1] if c >= 0 else "none" for k, c in zip(known, context.tolist(), strict=True)
    ]
    ids = [
        sample_id(text, negative, image_seed, fingerprint, image)
        for text, negative, image_seed, image in zip(
            texts, negatives, seeds, references, strict=True
        )
    ]
    columns = {
        "sample_id": ids,
        "class_index": [k.class_index for k in known],
        "class_name": [k.class_name for k in known],
        "meaning": [k.meaning for k in known],
        "kind": pa.array(KINDS).take(pa.array(kind)),
        "style": pa.array(["", *(s.name for s in styles)]).take(pa.array(style + 1)),
        "prompt": texts,
        "negative_prompt": negatives,
        "context_source": sources,
        "seed": seeds,
        "reference": references,
    }
    return pa.table(columns, schema=PLAN_SCHEMA)


class _Prompts(dict[int, tuple[str, str]]):
    """Prompts, each with what it lost, by the number of their class, kind, context and style; written
    when first asked for.

    The first `PROMPTS_KEPT` are kept: rows come back to them in cycles, and so the first ones are as
    good to keep as the last.
    """

    def __init__(
        self, classes: Sequence[ClassPrompts], styles: Sequence[Style], **limit: Any
    ) -> None:
        super().__init__()
        self.shortened: Counter[str] = Counter()
        self.negative, self.in_words = "", False
        self._classes, self._styles, self._limit = classes, styles, limit
        most_contexts = max((len(known.contexts) for known in classes), default=0)
        self._shape = (len(classes), len(KINDS), most_contexts + 1, len(styles) + 1)

    def of(
        self, position: np.ndarray, kind: np.ndarray, context: np.ndarray, style: np.ndarray
    ) -> list[str]:
        """The prompts of some rows; a context or style of -1 is none."""
        keys = np.ravel_multi_index((position, kind, context + 1, style + 1), self._shape)
        found = [self[key] for key in keys.tolist()]
        self.shortened.update(lost for _, lost in found if lost)
        return [prompt for prompt, _ in found]

    def told_apart(
        self, texts: list[str], known: Sequence[ClassPrompts], seeds: Sequence[int]
    ) -> tuple[list[str], list[str]]:
        """The prompts and negative prompts of some rows, half of them saying what their class is not
        (`ClassPrompts.unlike`), where there is room for it: by their seeds, since kinds take turns."""
        negatives = [self.negative] * len(texts)
        for at in [i for i, k in enumerate(known) if k.unlike and seeds[i] % 2]:
            unlike = known[at].unlike
            if self.in_words:
                texts[at] = self._if_fits(f"{texts[at]}, not {unlike}", texts[at])
            else:
                joined = ", ".join(filter(None, [self.negative, unlike]))
                negatives[at] = self._if_fits(joined, self.negative)
        return texts, negatives

    def _if_fits(self, text: str, else_: str) -> str:
        return text if self._limit["count_tokens"](text) <= self._limit["max_tokens"] else else_

    def __missing__(self, key: int) -> tuple[str, str]:
        position, kind, context, style = map(int, np.unravel_index(key, self._shape))
        known = self._classes[position]
        scene = known.contexts[context - 1][0] if context else Context()
        lost: Counter[str] = Counter()
        limit = {**self._limit, "lost": lost}
        name, meaning = known.said or known.class_name, known.meaning
        if KINDS[kind] == "stylized":
            prompt = stylized_prompt(self._styles[style - 1], name, meaning, scene, **limit)
        elif KINDS[kind] == "contextual":
            prompt = contextual_prompt(name, meaning, scene, **limit)
        else:
            prompt = plain_prompt(name, meaning, **limit)
        written = prompt, next(iter(lost), "")
        if len(self) < PROMPTS_KEPT:
            self[key] = written
        return written


def sample_id(
    prompt: str, negative_prompt: str, seed: int, fingerprint: str, reference: str = ""
) -> str:
    """Hex digest of what makes an image; `reference` counts only where there is one."""
    parts = [prompt, negative_prompt, str(seed), fingerprint]
    text = "\x1f".join([*parts, reference] if reference else parts)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def kinds(mix: dict[str, float]) -> Iterator[tuple[str, int]]:
    """The kind of each of a class's images, without end, and how many of that kind came before it.

    Each goes to the kind that is furthest behind its share, so that every prefix is mixed.
    """
    total = sum(mix.values())
    shares = {kind: mix[kind] / total for kind in KINDS if mix.get(kind, 0) > 0}
    counts = dict.fromkeys(shares, 0)
    for done in itertools.count():
        kind = max(shares, key=lambda k: shares[k] * (done + 1) - counts[k])
        yield kind, counts[kind]
        counts[kind] += 1


def _digest_int(seed: int, key: int, round_number: int) -> int:
    """A 48-bit seed: unlike a hash of Python's, the same everywhere."""
    digest = hashlib.sha256(b"%d:%d:%d" % (seed, key, round_number)).digest()
    return int.from_bytes(digest[:6], "big")
