"""What a user is told: the exception of users' mistakes, nearest names, long lists cut short, times."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class UserError(ValueError):
    """A mistake that a user can fix; its message names the thing and the fix.

    The command prints it as one line, without a traceback. A bare ValueError is a bug, and keeps its
    traceback.
    """


def first_line(error: BaseException, most: int = 300) -> str:
    """`OSError: no such file`: a library's error in a message of ours, its first line alone."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0][:most]}"


def nearest(given: Any, known: Iterable[Any], *, cutoff: float = 0.5, most: int = 1) -> list[str]:
    """Of `known` names, the `most` that are most like what was given, best first; often none."""
    return difflib.get_close_matches(str(given), list(map(str, known)), n=most, cutoff=cutoff)


def did_you_mean(
    given: Any, known: Iterable[Any], *, known_as: str = "known", most: int = 1
) -> str:
    """`did you mean 'crane'?`, or `known: cat, dog` where no name is near."""
    names = sorted(map(str, known))
    near = nearest(given, names, most=most)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"{known_as}: {shortened(names, 30)}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it follows from: libraries wrap others' errors in their own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def shortened(names: Sequence[Any], most: int, *, what: str = "", joint: str = ", ") -> str:
    """`a, b and 3 more`: the first `most` names, and how many there are besides.

    Args:
        what: what is counted besides: `a, b and 3 more classes`.
    """
    more = len(names) - most
    text = joint.join(map(str, names[:most]))
    return f"{text} and {more} more{f' {what}' if what else ''}" if more > 0 else text


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
