"""Lists of images as long-tailed sets are published: a line `path label` for each image."""

from __future__ import annotations

from ray_synth.errors import UserError
from ray_synth.storage.texts import read_text


def read_image_list(place: str) -> list[tuple[str, str]]:
    """(path, label) of each line of a text file or URI, by path; the label is the line's last word.

    Raises:
        UserError: there is no such file, a line is not of this form, or an image comes twice.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(place).splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise UserError(
                f"{place}, line {number}: {line[:80]!r} is not `path label` with a path below the "
                "source's own"
            )
        name = name.strip()
        if name in found:
            raise UserError(f"{place}, line {number}: {name} comes twice")
        found[name] = label
    if not found:
        raise UserError(f"{place} lists no image")
    return sorted(found.items())
