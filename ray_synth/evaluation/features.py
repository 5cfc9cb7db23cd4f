"""Feature arrays, checked before anything is measured on them. Pure; no Ray."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ray_synth.errors import UserError

Rows = NDArray[np.floating]


def checked_rows(features: Rows, name: str, least: int = 2) -> NDArray[np.float64]:
    """`features` as (n, dim) float64.

    Args:
        features: (n, dim) of any float type.
        name: what messages call them, a plural.
        least: the fewest rows that will do.

    Raises:
        ValueError: for another shape, fewer rows, and values that are not finite.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} have the shape {rows.shape}, but (images, dim) is needed")
    if len(rows) < least:
        raise UserError(f"{name} need at least {least} rows, but have {len(rows)}")
    if len(bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))):
        raise ValueError(
            f"{name} have NaN or infinity in {len(bad)} of {len(rows)} rows, first in row {bad[0]}"
        )
    return rows


def checked_pair(
    real: Rows, synthetic: Rows, *, least: int = 2, unit: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Real and synthetic features as float64 of one dim, with `unit` as unit rows.

    Args:
        least: the fewest synthetic rows; real ones are 2 or more.

    Raises:
        ValueError: see `checked_rows` and `unit_rows`; also for sets of different dim.
    """
    check = unit_rows if unit else checked_rows
    left = check(real, "real features")
    right = check(synthetic, "synthetic features", least)
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"real features have {left.shape[1]} columns and synthetic ones {right.shape[1]}: "
            "they must come from the same model"
        )
    return left, right


def unit_rows(features: Rows, name: str, least: int = 2) -> NDArray[np.float64]:
    """`features` as (n, dim) float64, each row scaled to length 1.

    Raises:
        ValueError: see `checked_rows`; also for rows of length 0.
    """
    rows = checked_rows(features, name, least)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if len(empty := np.flatnonzero(lengths == 0)):
        raise ValueError(
            f"{name} have length 0, so no direction, in {len(empty)} of {len(rows)} rows, "
            f"first in row {empty[0]}"
        )
    return rows / lengths
