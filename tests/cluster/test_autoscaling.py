"""A pool of generators on a cluster that grows under load and shrinks again, on fake GPU nodes.

Ray Data's default autoscaler holds its nodes until a stream ends. The one named V2 lets them go when they
are no longer used; it needs node types that declare their memory.
"""

import json
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_cluster import autoscaling_cluster, painted, painting_job, run_driver, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes end by their session")
BATCH = 16
HEAVY, LIGHT = 45 * BATCH, BATCH
IDS = [f"{i:06d}" for i in range(HEAVY + LIGHT)]
POLL_S = 0.25


@pytest.mark.slow
def test_nodes_join_under_load_and_leave_in_the_tail_of_a_stream(tmp_path):
    release = {
        "RAY_DATA_CLUSTER_AUTOSCALER": "V2",
        "RAY_DATA_LOW_UTIL_REQUEST_RELEASE_DELAY_S": "0",
        "RAY_DATA_CLUSTER_UTIL_AVG_WINDOW_S": "2",
    }
    (streamed,) = one_four_one(tmp_path, [(HEAVY + LIGHT, 4)], release)
    assert sorted(streamed) == IDS


@pytest.mark.slow
def test_nodes_leave_between_a_heavy_stream_and_a_light_one(tmp_path):
    heavy, light = one_four_one(tmp_path, [(HEAVY, 4), (HEAVY + LIGHT, 1)], {})
    assert sorted(heavy) == IDS[:HEAVY]
    assert sorted(light) == IDS, "what was made before is read"


def one_four_one(folder, streams, variables):
    """Run streams on a cluster that goes from one node to four and back; the ids that each gave."""
    with autoscaling_cluster(folder, max_workers=4, idle_seconds=4) as (address, env):
        # Ray Data asks for nodes every 10 s by default.
        env |= {"RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "2", **variables}
        call = f"test_autoscaling.drive({address!r}, {str(folder)!r}, {streams})"
        run_driver(call, env, folder, 240)
    nodes, ids = json.loads((folder / "seen.json").read_text())
    counts = [count for _, count in nodes]
    assert (counts[0], max(counts), counts[-1]) == (1, 4, 1), nodes
    rows = painted(folder)
    assert (folder / "enough").exists(), "four nodes made images side by side"
    last_left = nodes[-1][0]
    assert rows[0][0] < last_left < rows[-1][0], "images were being made all the while"
    assert sorted(sample for _, _, sample in rows) == IDS, "each was made once"
    return ids


def drive(address: str, folder_name: str, streams: list[tuple[int, int]]) -> None:
    """Stream plans of so many images through pools of so many actors, and note the live GPU nodes.

    Rows take their time until four nodes have made some, and then none; those of the last batch wait
    until one node is left.
    """
    import ray

    from ray_synth.cluster.connection import connect
    from ray_synth.config import ClusterConfig
    from ray_synth.generation.stream import image_stream

    folder, ended = Path(folder_name), threading.Event()
    nodes: list[tuple[float, int]] = []

    def gpu_nodes() -> int:
        return sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes())

    def watch() -> None:
        while not ended.wait(POLL_S):
            count, rows = gpu_nodes(), painted(folder)
            if not nodes or nodes[-1][1] != count:
                nodes.append((time.time(), count))
                print(*nodes[-1], len(rows), flush=True)
            if count == 4 and len({node for _, node, _ in rows[-4 * BATCH :]}) == 4:
                (folder / "enough").touch()
            if count == 1 and len(rows) > HEAVY:
                (folder / "alone").touch()

    def stream(images: int, actors: int) -> list[str]:
        pace = {"seconds": 0.25, "last": IDS[HEAVY], "patience": 1.5}
        pool = {"min_size": 1, "max_size": actors}
        job = painting_job(folder, images, pool=pool, pace=pace, num_gpus=1, batch_size=BATCH)
        ids = [row["sample_id"] for row in image_stream(job).iter_rows()]
        print(time.time(), "streamed", len(ids), flush=True)
        return ids

    with connect(ClusterConfig(address=address)):
        assert wait_for(lambda: gpu_nodes() == 1, 60)
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            ids = [stream(images, actors) for images, actors in streams]
        finally:
            ended.set()
            watcher.join()
    (folder / "seen.json").write_text(json.dumps([nodes, ids]))
