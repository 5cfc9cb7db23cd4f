"""Names that any MLflow server takes for what a run calls its figures: class names hold anything.

Nested mappings come in; flat entries with safe and distinct names come out, and a table of those that had
to be changed, for the run's artifacts.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

LONGEST = 250  # characters of a metric's or parameter's name
UNSAFE = re.compile(r"[^\w./ -]")
CHANGED = "metric_names.json"
Path = tuple[str, ...]


def leaves(values: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(keys from the outside in, value) of each value of a nested mapping."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def safe_names(paths: Sequence[Path]) -> list[str]:
    """A name for each path, its keys joined by dots: all different, also to a database that looks at
    neither case nor accents.

    Whatever had to be changed, cut or told apart ends in a digest of the path: a name depends on its own
    path, and on whether another one is read the same.
    """
    joined = [".".join(path) for path in paths]
    clean = [_clean(name) for name in joined]
    alike = Counter(map(_folded, clean))
    return [
        name if name == full and alike[_folded(name)] == 1 else _marked(name, path)
        for name, full, path in zip(clean, joined, paths, strict=True)
    ]


def changed_names(paths: Sequence[Path], names: Sequence[str]) -> list[dict[str, Any]]:
    """`{"metric": name, "stands_for": keys}` of the names that do not say their path in full."""
    return [
        {"metric": name, "stands_for": list(path)}
        for path, name in zip(paths, names, strict=True)
        if name != ".".join(path)
    ]


def _clean(name: str) -> str:
    """The name with nothing in it that MLflow refuses, LONGEST at most."""
    name = UNSAFE.sub("_", name).strip()[:LONGEST].strip()
    if not name or posixpath.normpath(name) != name or name.startswith((".", "/")):
        name = "_" + name.replace("/", "_")[: LONGEST - 1]
    return name


def _marked(name: str, path: Path) -> str:
    digest = hashlib.sha256(repr(path).encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{name[: LONGEST - 13].rstrip(' /')}-{digest}"


def _folded(name: str) -> str:
    apart = unicodedata.normalize("NFKD", name.casefold())
    return "".join(char for char in apart if not unicodedata.combining(char))
