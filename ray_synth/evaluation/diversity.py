"""How different the synthetic images of a class are, from each other and from the real. Pure; no Ray.

Embeddings of images (of CLIP, say) or prompts go in, and plain numbers come out. Images compare by
direction: rows are first scaled to length 1 in float64, so those stored in half precision will do,
and distances are taken in blocks of 32 MB. What depends on the number of images says so: compare it
at equal counts only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ray_synth.errors import UserError
from ray_synth.evaluation.features import Rows, checked_pair, unit_rows
from ray_synth.generation.thresholds import EXACT_COPY

BLOCK_ENTRIES = 2**22  # of one block of distances: 32 MB of float64
ROUNDING = 1e-12  # in cosine distance: what is nearer by less is not nearer
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class CopyPair:
    """Rows of a synthetic image and of the real one nearest to it, and their cosine distance."""

    synthetic: int
    real: int
    distance: float


@dataclass(frozen=True)
class Copies:
    """What `copies` found.

    Attributes:
        share: of the synthetic images, 0 to 1, that are nearer to a real one than `threshold`.
        threshold: a cosine distance.
        pairs: the closest pairs, the closest first; those with a distance below `threshold` count
            as copies.
    """

    share: float
    threshold: float
    pairs: tuple[CopyPair, ...]


@dataclass(frozen=True)
class PromptDiversity:
    """How prompts differ in their words.

    Attributes:
        prompts: how many there are.
        distinct: how many remain when those equal up to case and spacing are counted once.
        distinct_1, distinct_2: distinct words, and pairs of neighbouring words, over all of them,
            0 to 1 (0 where there is none).
        mean_words: words per prompt.
    """

    prompts: int
    distinct: int
    distinct_1: float
    distinct_2: float
    mean_words: float


def pairwise_distance(features: Rows) -> float:
    """The mean cosine distance of all pairs of different rows, exactly, 0 (all equal) to 2.

    The similarities of all pairs add up to the squared length of the sum of all rows, so it takes
    O(n dim). It does not depend on the number of images.

    Args:
        features: (n, dim) float, n >= 2.

    Raises:
        ValueError: for fewer than 2 rows, and rows of NaN, infinity or length 0.
    """
    rows = unit_rows(features, "features")
    total = rows.sum(axis=0)
    pairs = len(rows) * (len(rows) - 1)
    return max(0.0, 1.0 - (float(total @ total) - float(np.vdot(rows, rows))) / pairs)


def vendi_score(features: Rows) -> float:
    """The effective number of different images: the Vendi score with the cosine kernel.

    exp of the Shannon entropy of the eigenvalues of K / n, where K holds the similarities (Friedman
    and Dieng, "The Vendi Score", TMLR 2023, arXiv 2210.02410, section 3): 1 where all are equal,
    n where no two have anything in common. Images that are similar count in part, and a second copy
    of the whole set adds nothing. It grows with the number of images, up to dim, the most that the
    cosine kernel can tell apart; compare it at equal n.

    X Xᵀ / n and Xᵀ X / n have the same eigenvalues but for zeros; the smaller of the two is used.

    Args:
        features: (n, dim) float, n >= 2.

    Returns:
        1 to min(n, dim).

    Raises:
        ValueError: see `pairwise_distance`.
    """
    rows = unit_rows(features, "features")
    smaller = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values = np.linalg.eigvalsh(smaller).clip(0)
    shares = values[values > 0] / values.sum()
    score = np.exp(-float((shares * np.log(shares)).sum()))
    return float(np.clip(score, 1, len(smaller)))


def coverage(real: Rows, synthetic: Rows, *, k: int = 5) -> float:
    """The share of real images that have a synthetic one about: whether the class is made in full.

    About an image is what is nearer to it than its k-th nearest other real image (Naeem et al.,
    "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020, arXiv 2002.09797,
    section 3). As many new real images in the place of the synthetic ones give about 1 - 2 ** -k. It
    falls with fewer synthetic images.

    Args:
        real: (n, dim) float, n > k.
        synthetic: (m, dim) float, m >= 2.
        k: which neighbour, from 1.

    Returns:
        0 to 1. A real image that has k exact copies or more has nothing about it.

    Raises:
        ValueError: see `pairwise_distance`; also for k out of 1 to n - 1, and sets of different dim.
    """
    return float((_count_about(real, synthetic, k) > 0).mean())


def density(real: Rows, synthetic: Rows, *, k: int = 5) -> float:
    """How much the synthetic images are where the real ones are dense: fidelity rather than diversity.

    The mean number of real images that a synthetic one is about, over k (Naeem et al. 2020; see
    `coverage`, also for the arguments and errors). New real images give about 1, as
    does the real set itself; typical but monotonous images give more, outliers 0.

    Returns:
        0 or more.
    """
    counts = _count_about(real, synthetic, k)
    return float(counts.sum()) / (k * len(synthetic))


def copies(real: Rows, synthetic: Rows, *, quantile: float = 0.01, show: int = 12) -> Copies:
    """Synthetic images that are nearer to a real one than real images are to each other.

    The threshold is a quantile of the real images' own distances to their nearest other, exact copies
    among them left out. Images as new as another draw of real ones have about the share `quantile`
    below it; a share well above means that the generator (or its training data) knows these images.
    With fewer than 1 / quantile real images the share to be expected is rather 1 / n. Every threshold
    of this kind is a hint: look at the pairs.

    Args:
        real: (n, dim) float, n >= 2: the images that were trained on.
        synthetic: (m, dim) float, m >= 1.
        quantile: 0 to 1.
        show: how many of the closest pairs to name, at most.

    Raises:
        ValueError: see `pairwise_distance`; also for sets of different dim, and a quantile or `show`
            out of range.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"the quantile is {quantile}, but must be within 0 and 1")
    if show < 0:
        raise ValueError(f"show is {show}, but must be 0 or more")
    real, synthetic = checked_pair(real, synthetic, least=1, unit=True)
    own = _kth_nearest(real, 1)
    different = own[own > EXACT_COPY]
    threshold = float(np.quantile(different, quantile)) if len(different) else EXACT_COPY
    distance, nearest = np.empty(len(synthetic)), np.empty(len(synthetic), dtype=np.int64)
    for part in _parts(len(synthetic), len(real)):
        apart = _distances(synthetic[part], real)
        nearest[part], distance[part] = apart.argmin(axis=1), apart.min(axis=1)
    closest = np.argsort(distance, kind="stable")[:show]
    return Copies(
        share=float((distance < threshold).mean()),
        threshold=threshold,
        pairs=tuple(CopyPair(int(i), int(nearest[i]), float(distance[i])) for i in closest),
    )


def prompt_diversity(prompts: Sequence[str]) -> PromptDiversity:
    """How different prompts are as texts: distinct ones, distinct words and pairs of words, length.

    The two ratios are distinct-1 and distinct-2 (Li et al., "A Diversity-Promoting Objective Function
    for Neural Conversation Models", NAACL 2016, arXiv 1510.03055). Pairs do not reach
    from one prompt into the next. Case does not count, nor does punctuation between words. The ratios
    fall as prompts get more or longer; compare them at equal counts.

    Raises:
        ValueError: when there is no prompt, or no word in any.
    """
    texts = [prompt.casefold() for prompt in prompts]
    words = [WORD.findall(text) for text in texts]
    singles = [word for line in words for word in line]
    if not singles:
        raise ValueError(f"{len(texts)} prompts without a word: there is nothing to measure")
    pairs = [pair for line in words for pair in pairwise(line)]
    return PromptDiversity(
        prompts=len(texts),
        distinct=len({" ".join(text.split()) for text in texts}),
        distinct_1=len(set(singles)) / len(singles),
        distinct_2=len(set(pairs)) / len(pairs) if pairs else 0.0,
        mean_words=len(singles) / len(texts),
    )


def _count_about(real: Rows, synthetic: Rows, k: int) -> NDArray[np.int64]:
    """(n,): how many synthetic rows are nearer to each real row than its k-th nearest real row."""
    real, synthetic = checked_pair(real, synthetic, unit=True)
    if not 1 <= k < len(real):
        raise UserError(
            f"k is {k}, but {len(real)} real images have from 1 to {len(real) - 1} neighbours each"
        )
    radius = _kth_nearest(real, k)
    counts = np.empty(len(real), dtype=np.int64)
    for part in _parts(len(real), len(synthetic)):
        about = _distances(real[part], synthetic) < radius[part, None] - ROUNDING
        counts[part] = about.sum(axis=1)
    return counts


def _kth_nearest(rows: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """(n,): each unit row's cosine distance to its k-th nearest other row."""
    found = np.empty(len(rows))
    for part in _parts(len(rows), len(rows)):
        apart = _distances(rows[part], rows)
        apart[np.arange(len(apart)), np.arange(part.start, part.start + len(apart))] = np.inf
        found[part] = np.partition(apart, k - 1, axis=1)[:, k - 1]
    return found


def _distances(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """(left, right) cosine distances of unit rows, 0 or more."""
    return (1.0 - left @ right.T).clip(0)


def _parts(rows: int, width: int) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` entries in blocks of at most `BLOCK_ENTRIES`."""
    step = max(1, BLOCK_ENTRIES // width)
    return (slice(start, start + step) for start in range(0, rows, step))
