"""Nodes that will be taken away: how Ray is told of one, and when training saves before it goes.

Ray 2.60 passes a notice on: Serve starts replicas elsewhere before it stops those on the node, Ray Data
gives the node's actors no more batches, Ray Train moves to other nodes at the deadline. It does not save
what was trained since the last checkpoint; `Notices` says when to.
"""

from __future__ import annotations

import time
from typing import Any

UNKNOWN_S = 120.0  # Ray Train's own guess of a deadline that is not told
LAST_S = 2.0  # with less left than this, saving is not begun again


def announce(gcs_address: str, node_id: str, seconds: float, message: str) -> None:
    """Tell Ray that a node goes in so many seconds; from now on it gets no new work.

    Ray takes a node that went before its time for a crash: where a cloud says when, tell a little less.

    Raises:
        RuntimeError: Ray does not accept it.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
    deadline_ms = int((time.time() + seconds) * 1000)
    client = GcsClient(address=gcs_address)
    accepted, why_not = client.drain_node(node_id, reason, message, deadline_ms)
    if not accepted:
        raise RuntimeError(f"Ray does not let go of node {node_id}: {why_not}")


class SaveTimes:
    """When to save before a deadline: at once, and whenever half of what was left then has passed.

    A node may go early; this way what is lost is never more than what was left to train.
    """

    def __init__(self) -> None:
        self.notice: Any = None
        self.left_s = float("inf")

    def due(self, notice: Any, left_s: float) -> bool:
        """Whether to save now, with so many seconds left. Another notice starts anew."""
        if notice != self.notice:
            self.notice, self.left_s = notice, float("inf")
        if self.left_s <= LAST_S or left_s > self.left_s / 2:
            return False
        self.left_s = left_s
        return True


class Notices:
    """What a training worker hears of the nodes that its group runs on."""

    def __init__(self) -> None:
        self.times = SaveTimes()
        self.heard = 0.0

    def save_now(self) -> bool:
        """Whether to save before a node goes. All ranks call it at the same steps, and get one answer."""
        import ray.train
        import ray.train.collective

        info = ray.train.get_preemption_info()
        if info is None:
            return False
        now = time.time()
        self.heard = self.heard or now
        deadline = info.deadline_ms / 1000 if info.deadline_ms else self.heard + UNKNOWN_S
        return ray.train.collective.broadcast_from_rank_zero(self.times.due(info, deadline - now))
