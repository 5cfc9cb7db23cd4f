"""Nodes that will be taken away: how a notice reaches Ray, and when training saves before one goes.

    python -m ray_synth.cluster.preemption aws --address HEAD:6379

Open source Ray asks no cloud. Run this beside `ray start` on every spot node: it asks the machine's
metadata service, and at a notice tells Ray when the node goes. It needs no rights in the cloud.

Ray 2.60 passes a notice on: Serve starts replicas elsewhere before it stops those on the node, Ray Data
gives the node's actors no more batches, Ray Train moves to other nodes at the deadline. It does not save
what was trained since the last checkpoint; `Notices` says when to.
"""

from __future__ import annotations

import argparse
import email.utils
import logging
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import httpx

from ray_synth.errors import UserError

log = logging.getLogger("ray_synth.cluster.preemption")
POLL_S = 2.0
# Told to Ray earlier by this: a node that goes before its time counts as crashed.
MARGIN_S = 5.0
GCP_NOTICE_S = 30.0  # Google says that it goes, not when
METADATA = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}
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
        """Whether to save now, with so many seconds left. Another notice starts over."""
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


def ask_aws(http: httpx.Client) -> float | None:
    """When this EC2 instance is stopped, in seconds since the epoch, if it is known."""
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = http.put("/latest/api/token", headers=lifetime).raise_for_status().text
    found = http.get(
        "/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    if found.status_code == 404:
        return None
    return datetime.fromisoformat(found.raise_for_status().json()["time"]).timestamp()


def ask_gcp(http: httpx.Client) -> float | None:
    """When this Compute Engine instance is stopped."""
    google = {"Metadata-Flavor": "Google"}
    found = http.get("/computeMetadata/v1/instance/preempted", headers=google).raise_for_status()
    return time.time() + GCP_NOTICE_S if found.text.strip() == "TRUE" else None


def ask_azure(http: httpx.Client) -> float | None:
    """When this virtual machine is evicted. Its whole scale set's events are listed."""
    http.headers["Metadata"] = "true"
    name = {"api-version": "2021-02-01", "format": "text"}
    mine = http.get("/metadata/instance/compute/name", params=name).raise_for_status().text
    found = http.get("/metadata/scheduledevents", params={"api-version": "2020-07-01"})
    for event in found.raise_for_status().json()["Events"]:
        if event["EventType"] == "Preempt" and mine in event["Resources"]:
            # Empty once it has begun.
            at = event["NotBefore"]
            return email.utils.parsedate_to_datetime(at).timestamp() if at else time.time()
    return None


ASK = {"aws": ask_aws, "gcp": ask_gcp, "azure": ask_azure}


def watch(
    cloud: str, tell: Callable[[float], None], *, url: str | None = None, poll_s: float = POLL_S
) -> None:
    """Ask until there is a notice, then tell the seconds that are left, once.

    Raises:
        UserError: the metadata service does not answer the first time.
    """
    url = url or METADATA[cloud]
    answered = False
    # Not through a proxy: it would ask about its own machine.
    with httpx.Client(base_url=url, timeout=10, trust_env=False) as http:
        while True:
            try:
                goes = ASK[cloud](http)
            except httpx.HTTPError as error:
                if not answered:
                    raise UserError(
                        f"no metadata service of {cloud} answers at {url} ({error}): is this the cloud?"
                    ) from None
                log.warning("the metadata service does not answer (%s); asking again", error)
                goes = None
            answered = True
            if goes is not None:
                return tell(max(0.0, goes - time.time() - MARGIN_S))
            time.sleep(poll_s)


def node_here(gcs_address: str) -> str:
    """The id of the Ray node on this machine. Raises UserError where there is none."""
    import ray.util
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import gcs_pb2

    alive = gcs_pb2.GcsNodeInfo.ALIVE  # type: ignore[attr-defined]
    here = ray.util.get_node_ip_address()
    nodes = GcsClient(address=gcs_address).get_all_node_info()
    for node_id, node in nodes.items():
        if node.state == alive and node.node_manager_address == here:
            return node_id.hex()
    raise UserError(f"the cluster at {gcs_address} has no node at {here}: run `ray start` first")


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m ray_synth.cluster.preemption", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("cloud", choices=sorted(ASK))
    parser.add_argument("--address", required=True, help="of the head: HOST:6379")
    parser.add_argument("--node-id", help="default: of the node on this machine")
    parser.add_argument("--metadata-url", help="of the metadata service, for tests")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        node_id = given.node_id or node_here(given.address)

        def tell(seconds: float) -> None:
            log.info("%s takes node %s away in %.0f s", given.cloud, node_id, seconds)
            announce(given.address, node_id, seconds, f"a notice of {given.cloud}")

        watch(given.cloud, tell, url=given.metadata_url)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
