"""The drill: ten nodes go, half of them unannounced, and ten come, while all parts are at work.

Four nodes with a fake GPU each. Two workers train live on what a pool of generators makes, and callers
ask the disambiguation service all the while. Nodes are chosen by what they hold, each kind in turn.
"""

import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from drill import ROLES, Callers, Nodes, Pace, require, start_node
from fake_cluster import (
    environment,
    free_port,
    painted,
    painting_job,
    run_driver,
    short_folder,
)
from metadata import QUIET_ASKS, metadata_service

from ray_synth.cluster import preemption
from ray_synth.generation.maker import GenerationJob, ImageMaker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes end by their session")
BATCH, ROWS, POOL = 8, 2400, 2
STEPS, CHECKPOINT_EVERY = 500, 10  # more steps than the schedule takes
IDS = [f"{i:06d}" for i in range(ROWS)]
NOTICE_S = 20
# What each removed node holds, and whether Ray is told before.
TRAINING, GENERATOR, CLIP, LLM, INGRESS = ROLES
REMOVALS = [
    (TRAINING, False), (TRAINING, True), (CLIP, False), (INGRESS, True), (GENERATOR, False),
    (GENERATOR, True), (LLM, False), (CLIP, True), (TRAINING, False), (TRAINING, True),
]  # fmt: skip
# Errors that callers may meet over HTTP; through the handle, the pipeline's way, they meet none.
EXPLAINED = {
    "500": "the ingress replica that had the question died with its node: Serve's proxy says so",
    "504": "no replica of a model was ready within the service's own limit of 120 s",
    "503": "a model's replicas were all gone for longer than the service asks again",
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_nodes_go_and_come_under_generation_training_and_service(tmp_path):
    with short_folder() as temporary:
        env = environment(temporary) | {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
        run_driver(f"test_drill.drive({str(tmp_path)!r})", env, tmp_path, 1640)
    seen = json.loads((tmp_path / "seen.json").read_text())
    print(json.dumps(seen, indent=1))

    assert [point["step"] for point in seen["curve"]] == list(range(1, STEPS + 1))

    assert [event["announced"] for event in seen["events"]] == [told for _, told in REMOVALS]
    for event in seen["events"]:
        if event["announced"] and event["held"][TRAINING]:
            assert event["saved"], "a checkpoint between the regular ones, at the notice"

    store = generation(tmp_path).store
    kept = pa.concat_tables(store.read(name) for name in store.parts())
    assert sorted(kept["sample_id"].to_pylist()) == IDS, "the store holds each row once"
    images = dict(zip(kept["sample_id"].to_pylist(), kept["image"].to_pylist(), strict=True))
    some = undisturbed(tmp_path / "undisturbed", 10 * BATCH)
    assert {sample: images[sample] for sample in some} == some

    times = Counter(sample for _, _, sample in painted(tmp_path))
    assert sum(times.values()) - ROWS == seen["made_again"]
    assert seen["made_again"] <= 2 * BATCH * POOL * (len(REMOVALS) + seen["restarts"])

    service = seen["service"]
    assert service["wrong"] == []
    assert service["right"] == service["asked"] > 10 * len(REMOVALS)
    assert all(any(kind.startswith(known) for known in EXPLAINED) for kind in service["errors"])


def generation(folder: Path) -> GenerationJob:
    pool = {"min_size": 1, "max_size": POOL}
    pace = {"seconds": 0.5, "last": IDS[-10 * BATCH], "patience": 4}
    return painting_job(
        folder, ROWS, pool=pool, batch_size=BATCH, pace=pace, num_gpus=1, num_cpus=0.3
    )


def undisturbed(folder: Path, rows: int) -> dict[str, bytes]:
    """The encoded images of the plan's first rows, made in this process, by their ids."""
    folder.mkdir()
    (folder / "enough").touch()
    made = ImageMaker(generation(folder)).chunk(0, rows, [])
    return {row["sample_id"]: row["image"] for row in made}


def drive(folder_name: str) -> None:
    """Everything at once on four nodes, and the schedule beside it; writes `seen.json`."""
    from ray.cluster_utils import Cluster

    from ray_synth.cluster.connection import connect
    from ray_synth.config import ClusterConfig
    from ray_synth.generation.stream import make_images

    folder = Path(folder_name)
    pace = Pace(folder)
    pace.allow(1)
    # Ray takes 15 s by default to notice that a node is gone. Workers that it starts ahead of need
    # are of no use here: ours have an environment of their own.
    system = {
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 5,
        "prestart_worker_first_driver": False,
        "enable_metrics_collection": False,
    }
    cluster = Cluster(shutdown_at_exit=False)  # its signal handlers want the main thread
    start_node(cluster, num_cpus=0, include_dashboard=False, _system_config=system)
    nodes = Nodes(cluster, 4)
    started = time.monotonic()
    with connect(ClusterConfig(address=cluster.address)):
        with Callers(*serve_app(), pause_s=0.4) as callers, ThreadPoolExecutor(1) as thread:
            events = thread.submit(schedule, nodes, callers, pace)
            curve = train(folder, pace)
            make_images(generation(folder))
            made = len(painted(folder))
            seen = {
                "curve": curve,
                "events": events.result(),
                "seconds": round(time.monotonic() - started),
                "made_again": made - ROWS,
                **pace.summary(),
            }
        seen["service"] = callers.summary()
    (folder / "seen.json").write_text(json.dumps(seen))


def serve_app() -> tuple[str, Any]:
    """Deploy the service, two replicas of all but the language model; its address and its handle."""
    from ray import serve

    from ray_synth.config import ClipConfig, LlmConfig
    from ray_synth.service.app import ServeConfig, build

    port = free_port()
    http = {"host": "127.0.0.1", "port": port}
    serve.start(proxy_location="HeadOnly", http_options=http)
    config = ServeConfig(
        llm=LlmConfig(num_cpus=0.2), clip=ClipConfig(num_cpus=0.2, replicas=2), replicas=2
    )
    handle = serve.run(build(config), name="drill", route_prefix="/")
    return f"http://127.0.0.1:{port}", handle


def train(folder: Path, pace: Pace) -> list[dict[str, float]]:
    """Train live on what is generated meanwhile; the curve."""
    from digits import NAMES

    from ray_synth.config import SourceConfig, TrainingConfig
    from ray_synth.data.dataset import load_index, select
    from ray_synth.storage.folder import Folder
    from ray_synth.training.job import TrainJob
    from ray_synth.training.trainer import run_training

    config = TrainingConfig(
        model="test_resnet",
        image_size=32,
        augment="digits",
        steps=STEPS,
        batch_size=8,
        num_workers=2,
        num_cpus=2,  # a node has three: each worker on a node of its own
        log_every=1,
        checkpoint_every=CHECKPOINT_EVERY,
    )
    real = select(load_index(SourceConfig(format="digits", split="train"), NAMES), 3, seed=0)
    job = TrainJob(
        "mixed",
        config,
        STEPS,
        NAMES,
        0,
        Folder(folder),
        real,
        10**6,
        ROWS,
        board=pace,
        num_threads=1,
    )
    run_training(job, generation(folder), run_name="run")
    return Folder(folder).read_json("models/mixed.json")["curve"]


def schedule(nodes: Nodes, callers: Callers, pace: Pace) -> list[dict[str, object]]:
    """Remove and add nodes, each time once everything has moved on; what was seen of each."""
    try:
        return [event(number, *what, nodes, callers, pace) for number, what in enumerate(REMOVALS)]
    finally:  # also where it failed: training must not wait forever
        (pace.folder / "enough").touch()
        (pace.folder / "alone").touch()


def event(
    number: int, what: str, announced: bool, nodes: Nodes, callers: Callers, pace: Pace
) -> dict[str, object]:
    """Remove a node that holds something and add another; training steps on as both are seen."""
    before = Progress(pace, callers)
    pace.allow(6)
    require(lambda: before.moved(steps=6, rows=BATCH, answers=4), f"calm before removal {number}")
    require(lambda: nodes.choose(what) is not None, f"a node with {what}")
    node = nodes.choose(what)
    held = nodes.held_by(node)
    print(time.time(), number, what, announced, held, flush=True)
    saved: set[int] = set()
    if announced:
        regular = {*kept_steps(pace.folder), *range(0, STEPS, CHECKPOINT_EVERY)}
        with metadata_service(NOTICE_S) as (cloud, url):
            cloud.asks = QUIET_ASKS
            at = f"--address={nodes.cluster.address}"
            preemption.main(["aws", at, f"--node-id={node.node_id}", f"--metadata-url={url}"])
        while time.time() < cloud.goes.timestamp():
            pace.allow(1)
            time.sleep(0.5)
            saved.update(set(kept_steps(pace.folder)) - regular)
    nodes.kill(node)
    gone, before = time.time(), Progress(pace, callers)
    require(lambda: nodes.alive() == 3, "Ray knows that the node is gone")
    pace.allow(2)
    require(lambda: before.moved(steps=1, rows=1, answers=1), f"life on three nodes, {number}")
    back = round(time.time() - gone, 1)
    nodes.add()
    require(lambda: nodes.alive() == 4, "the new node")
    return {
        "hit": what,
        "held": held,
        "announced": announced,
        "saved": sorted(saved),
        "back_s": back,
    }


class Progress:
    """Steps trained, rows painted and questions answered by the time that it is made."""

    def __init__(self, pace: Pace, callers: Callers) -> None:
        self.count = lambda: (len(pace.steps()), len(painted(pace.folder)), callers.right)
        self.before = self.count()

    def moved(self, *, steps: int, rows: int, answers: int) -> bool:
        """Whether there are so many more of each by now."""
        wanted = zip(self.count(), self.before, (steps, rows, answers), strict=True)
        return all(now >= before + more for now, before, more in wanted)


def kept_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints Ray Train keeps."""
    kept = folder / "checkpoints" / "run" / "checkpoint_manager_snapshot.json"
    if not kept.exists():
        return []
    return [
        found["metrics"]["step"] for found in json.loads(kept.read_text())["checkpoint_results"]
    ]
