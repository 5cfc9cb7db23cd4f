"""Where more synthetic images stop helping: the study of scaling, read line by line. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ray_synth.studies.measures import Measured
from ray_synth.studies.results import IN_DOMAIN, Row, Table
from ray_synth.studies.statistics import paired

PAPER = 6.0  # synthetic images per real one, up to which the paper went
NOTE = (
    "Points, paired by seed. “Enough” is the smallest scale over which no larger one gains for sure: the "
    "paired 95% interval of every larger scale's gain over it reaches 0. Few seeds give wide intervals, "
    "and so a small “enough”: the other columns say which way the means go."
)


def measure_saturation(measured: Measured) -> list[Table]:
    """The table, as a study's measure."""
    return saturation_tables(measured.rows)


def saturation_tables(rows: Sequence[Row]) -> list[Table]:
    """For each line, BN and test set: the best scale, the smallest that is enough, the last steps.

    Args:
        rows: of a study whose lines have the number of synthetic images per real one as `x`.
    """
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.arm.x is not None:
            lines.setdefault((row.arm.line, row.bn, row.test_set), []).append(row)
    cells = [
        _line(line, bn, test_set, sorted(mine, key=lambda row: row.arm.x or 0))
        for (line, bn, test_set), mine in lines.items()
        if len(mine) > 1
    ]
    if not cells:
        return []
    head = ("line", "BN at test", "test set", "best mean at", "enough", "last step", "past 6x")
    return [Table("Where gains stop", head, tuple(cells), NOTE)]


def _line(line: str, bn: str, test_set: str, rows: list[Row]) -> tuple[str, ...]:
    best = max(rows, key=lambda row: row.top1.mean)
    enough = next(
        row
        for at, row in enumerate(rows)
        if not any(_surely_gains(later, row) for later in rows[at + 1 :])
    )
    last, before = rows[-1], rows[-2]
    past = [row for row in rows if (row.arm.x or 0) <= PAPER][-1:]
    return (
        line,
        bn,
        "in domain" if test_set == IN_DOMAIN else test_set.replace("_", " "),
        f"{best.arm.x:g}x",
        f"{enough.arm.x:g}x",
        f"{before.arm.x:g}x to {last.arm.x:g}x: {_change(last, before)}",
        f"{past[0].arm.x:g}x to {last.arm.x:g}x: {_change(last, past[0])}"
        if past and past[0] is not last
        else "",
    )


def _surely_gains(later: Row, earlier: Row) -> bool:
    change = paired(later.values, earlier.values)
    return change.num_seeds > 1 and change.mean - change.half > 0


def _change(later: Row, earlier: Row) -> str:
    return paired(later.values, earlier.values).shown(signed=True)
