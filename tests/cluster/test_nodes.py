"""A node that dies in mid-run, and one that joins: every row once, the same images, little made again."""

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from fake_cluster import (
    OBJECT_STORE,
    environment,
    painted,
    painting_job,
    run_driver,
    short_folder,
    wait_for,
)

from ray_synth.generation.maker import GenerationJob, ImageMaker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes end by their session")
BATCH, ROWS = 8, 400
IDS = [f"{i:06d}" for i in range(ROWS)]


@pytest.mark.slow
def test_a_node_lost_in_mid_run_costs_only_the_batches_in_work(tmp_path):
    with short_folder() as temporary:
        run_driver(f"test_nodes.drive({str(tmp_path)!r})", environment(temporary), tmp_path, 120)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert sorted(seen["ids"]) == IDS, "the stream gave each row once"

    store = job(tmp_path).store
    kept = pa.concat_tables(store.read(name) for name in store.parts())
    assert sorted(kept["sample_id"].to_pylist()) == IDS, "the store holds each row once"

    rows = painted(tmp_path)
    by_node = Counter(node for _, node, _ in rows)
    assert by_node[seen["lost"]] > 0 and by_node[seen["joined"]] > 0, by_node
    again = Counter(sample for _, _, sample in rows)
    repeated = [sample for sample, times in again.items() if times > 1]
    # Two batches are at work in an actor: one is painted while the one before is written.
    assert len(repeated) <= 2 * BATCH and max(again.values()) <= 2, repeated

    images = dict(zip(kept["sample_id"].to_pylist(), kept["image"].to_pylist(), strict=True))
    assert images == undisturbed(tmp_path / "undisturbed")


def job(folder: Path) -> GenerationJob:
    pool = {"min_size": 2, "max_size": 2}
    return painting_job(folder, ROWS, pool=pool, batch_size=BATCH, pace={"seconds": 0.1})


def undisturbed(folder: Path) -> dict[str, bytes]:
    """The encoded images of a run in this process, by their ids."""
    folder.mkdir()
    (folder / "enough").touch()
    rows = ImageMaker(job(folder)).chunk(0, ROWS, [])
    return {row["sample_id"]: row["image"] for row in rows}


def drive(folder_name: str) -> None:
    """Stream a plan on two nodes; when both have made images, kill one and let another join.

    Rows take their time until the one that joined has made some.
    """
    from ray.cluster_utils import Cluster

    from ray_synth.cluster.connection import connect
    from ray_synth.config import ClusterConfig
    from ray_synth.generation.stream import image_stream

    folder = Path(folder_name)
    small = {"object_store_memory": OBJECT_STORE}
    # Ray takes 15 s by default to notice that a node is gone.
    health = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(shutdown_at_exit=False)  # its signal handlers want the main thread
    cluster.add_node(num_cpus=0, include_dashboard=False, _system_config=health, **small)
    stays, dies = (cluster.add_node(num_cpus=1, **small) for _ in range(2))

    def disturb() -> dict[str, str]:
        assert wait_for(lambda: min(made_by(stays), made_by(dies)) >= BATCH, 60)
        cluster.remove_node(dies, allow_graceful=False)
        joins = cluster.add_node(num_cpus=1, **small)
        joined = wait_for(lambda: made_by(joins) >= BATCH, 60)
        (folder / "enough").touch()
        assert joined, "the node that joined made no images"
        return {"lost": dies.node_id, "joined": joins.node_id}

    def made_by(worker) -> int:
        return sum(node == worker.node_id for _, node, _ in painted(folder))

    with connect(ClusterConfig(address=cluster.address)), ThreadPoolExecutor(1) as thread:
        nodes = thread.submit(disturb)
        ids = [row["sample_id"] for row in image_stream(job(folder)).iter_rows()]
        (folder / "seen.json").write_text(json.dumps({"ids": ids, **nodes.result()}))
