"""ImageNet's classes: names in the order of timm's models, and how its folders name them.

Val, Sketch, R and A have one folder per WordNet id (R and A for 200 of them); V2 has one per index. The
lists are timm's.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from ray_synth.errors import UserError

CLASS_MAPS = ("imagenet_wnids", "imagenet_indices")


@lru_cache(maxsize=1)
def class_names() -> tuple[str, ...]:
    """The 1,000 names, all different: the first word of the synset, with more where two share it.

    Both cranes are "crane" in WordNet; they become "crane (large long-necked wading bird)" and
    "crane (lifts and moves heavy objects)". No other two share all their words.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    synsets = info.label_names()
    words = [info.label_name_to_description(synset) for synset in synsets]
    short = [text.split(", ")[0] for text in words]
    for chosen in (words, [_defined(info, synset) for synset in synsets]):
        often = Counter(short)
        short = [
            longer if often[name] > 1 else name for name, longer in zip(short, chosen, strict=True)
        ]
    assert len(set(short)) == len(short)
    return tuple(short)


def _defined(info: object, synset: str) -> str:
    text = info.label_name_to_description(synset, detailed=True)  # type: ignore[attr-defined]
    word, _, definition = text.partition(": ")
    return f"{word} ({' '.join(definition.split(';')[0].split(',')[0].split()[:5])})"


def class_map(kind: str) -> dict[str, str]:
    """Folder name -> class name.

    Args:
        kind: `imagenet_wnids` (n01440764, ...) or `imagenet_indices` (0 to 999, also as 0000).

    Raises:
        UserError: neither of the two.
    """
    from timm.data import ImageNetInfo

    names = class_names()
    if kind == "imagenet_wnids":
        return dict(zip(ImageNetInfo().label_names(), names, strict=True))
    if kind == "imagenet_indices":
        plain = {str(i): name for i, name in enumerate(names)}
        return plain | {f"{i:04d}": name for i, name in enumerate(names)}
    raise UserError(
        f"unknown class_map {kind!r}: give a mapping, or one of {', '.join(CLASS_MAPS)}"
    )
