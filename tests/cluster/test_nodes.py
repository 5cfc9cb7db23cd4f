"""A node that dies in mid-run, and one that joins: every row once, the same images, little made again."""

import json
import sys
import threading
from collections import Counter
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

from ray_synth.generation.maker import ImageMaker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes end by their session")
BATCH, ROWS = 4, 240
IDS = [f"{i:06d}" for i in range(ROWS)]
PACE = {"seconds": 0.1}


def test_a_node_lost_in_mid_run_costs_only_the_batches_in_work(tmp_path):
    with short_folder() as temporary:
        call = f"test_nodes.drive({str(tmp_path)!r}, {temporary!r})"
        run_driver(call, environment(temporary), tmp_path, 120)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert sorted(seen["ids"]) == IDS, "the stream gave each row once"

    store = painting_job(tmp_path, ROWS, pool=2, batch_size=BATCH, generator_kwargs=PACE).store
    kept = pa.concat_tables(store.read(name) for name in store.parts())
    assert sorted(kept["sample_id"].to_pylist()) == IDS, "the store holds each row once"

    rows = painted(tmp_path)
    by_node = Counter(node for _, node, _ in rows)
    assert by_node[seen["lost"]] > 0 and by_node[seen["joined"]] > 0, by_node
    again = Counter(sample for _, _, sample in rows)
    repeated = [sample for sample, times in again.items() if times > 1]
    # Two batches are at work in an actor: one is painted while the one before is written.
    assert len(repeated) <= 2 * BATCH and max(again.values()) <= 2, repeated

    undisturbed = images_of(tmp_path / "undisturbed")
    assert dict(zip(kept["sample_id"].to_pylist(), kept["image"].to_pylist(), strict=True)) == (
        undisturbed
    )


def images_of(folder: Path) -> dict[str, bytes]:
    """The encoded images of a run in this process, by their ids."""
    folder.mkdir()
    (folder / "enough").touch()
    job = painting_job(folder, ROWS, pool=1, batch_size=BATCH, generator_kwargs=PACE)
    return {row["sample_id"]: row["image"] for row in ImageMaker(job).chunk(0, ROWS, [])}


def drive(folder_name: str, temporary: str) -> None:
    """Stream a plan on two nodes; when both have made images, kill one and let another join.

    Rows take their time until the one that joined has made some.
    """
    from ray.cluster_utils import Cluster

    from ray_synth.cluster import connect
    from ray_synth.config import ClusterConfig
    from ray_synth.generation.stream import image_stream

    folder = Path(folder_name)
    small = {"object_store_memory": OBJECT_STORE}
    # Ray takes 15 s by default to notice that a node is gone.
    health = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster()
    cluster.add_node(
        num_cpus=0, temp_dir=temporary, include_dashboard=False, _system_config=health, **small
    )
    workers = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    nodes = {}

    def disturb() -> None:
        wait_for(lambda: made_by(workers[0]) >= 2 * BATCH and made_by(workers[1]) >= 2 * BATCH, 60)
        nodes["lost"] = workers[0].node_id
        cluster.remove_node(workers[0], allow_graceful=False)
        joined = cluster.add_node(num_cpus=1, **small)
        nodes["joined"] = joined.node_id
        wait_for(lambda: made_by(joined) >= 2 * BATCH, 60)
        (folder / "enough").touch()

    def made_by(worker) -> int:
        return sum(node == worker.node_id for _, node, _ in painted(folder))

    job = painting_job(folder, ROWS, pool=2, batch_size=BATCH, generator_kwargs=PACE)
    with connect(ClusterConfig(address=cluster.address)):
        disturber = threading.Thread(target=disturb)
        disturber.start()
        blocks = image_stream(job).iter_batches(batch_size=None, batch_format="pyarrow")
        ids = [sample for block in blocks for sample in block["sample_id"].to_pylist()]
        disturber.join()
    (folder / "seen.json").write_text(json.dumps({"ids": ids, **nodes}))
