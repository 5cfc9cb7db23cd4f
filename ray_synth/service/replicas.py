"""How many replicas a deployment has, as Ray Serve takes it."""

from __future__ import annotations

from typing import Any


def replica_options(
    replicas: int | tuple[int, int], autoscaling: dict[str, float], *, busy: float
) -> dict[str, Any]:
    """A number of replicas, or [fewest, most] with `busy` requests in work or waiting for each."""
    if isinstance(replicas, int):
        return {"num_replicas": replicas}
    fewest, most = replicas
    scaling = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": busy}
    return {"autoscaling_config": {**scaling, **autoscaling}}


__all__ = ["replica_options"]
