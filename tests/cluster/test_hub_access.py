"""On a cluster that was started without them, a run's workers have its token, mirror and cache; its
models are fetched once; and Ray writes the token nowhere."""

import json
import os
import sys
from pathlib import Path

import pytest
from fake_cluster import OBJECT_STORE, environment, run_driver, short_folder
from hubs import TOKEN, fake_hub

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes end by their session")
FILES = {"config.json": b"{}", "model.safetensors": b"w" * 5000}


@pytest.mark.slow
def test_workers_reach_the_hub_as_the_run_does_and_the_token_stands_nowhere(tmp_path):
    with fake_hub() as hub, short_folder() as temporary:
        hub.add("someone/gated", FILES, "gated")
        hub.seconds = 0.5
        env = environment(temporary)
        for name in [name for name in env if name.startswith("HF_")]:
            del env[name]
        run_driver(f"test_hub_access.drive({str(tmp_path)!r}, {hub.url!r})", env, tmp_path, 240)
        texts = [path.read_bytes() for path in Path(temporary).rglob("*") if path.is_file()]
    seen = json.loads((tmp_path / "seen.json").read_text())
    for who in ("task", "actor", "replica"):
        assert seen[who] == {
            "HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"),
            "no_proxy": "127.0.0.1",
        }, who  # fmt: skip
    assert hub.downloads == dict.fromkeys(FILES, 1), "by two nodes, which share a cache here"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    told = [line for line in seen["lines"] if line.startswith("fetching someone/gated: ")]
    assert all("of 2 nodes are ready" in line for line in told) and "0.0 GB so far" in told[-1]
    assert any(line.startswith("fetched someone/gated in ") for line in seen["lines"])
    assert "someone/none' is not at" in seen["refused"]
    assert seen["refused"].startswith("on node ")
    # What goes by `env_vars` is in the logs of the nodes, so the token would have been found there.
    assert any(b"RAY_DATA_DISABLE_PROGRESS_BARS" in text for text in texts)
    assert not any(TOKEN.encode() in text for text in texts)


def tell_often() -> list[str]:
    """Make downloads tell how far they are at once; the lines to come."""
    import logging

    from ray_synth.cluster import downloads

    downloads.QUIET_S = downloads.LINE_EVERY_S = 0.2
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    downloads.log.addHandler(handler)
    downloads.log.setLevel(logging.INFO)
    return lines


def drive(folder_name: str, url: str) -> None:
    """Two nodes; then the variables; then a run's connection, and what its workers see."""
    from ray.cluster_utils import Cluster

    folder = Path(folder_name)
    cluster = Cluster(shutdown_at_exit=False)  # its signal handlers want the main thread
    small = {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
    for _ in range(2):
        cluster.add_node(num_cpus=3, **small)
    os.environ |= {
        "HF_TOKEN": TOKEN, "HF_ENDPOINT": url, "HF_HOME": str(folder / "cache"), "no_proxy": "127.0.0.1",
    }  # fmt: skip

    import ray
    from ray import serve

    from ray_synth.cluster.connection import connect
    from ray_synth.cluster.downloads import fetch_on_nodes
    from ray_synth.config import ClusterConfig
    from ray_synth.errors import UserError
    from ray_synth.storage.hub import Repo

    def variables() -> dict[str, str | None]:
        names = ("HF_TOKEN", "HF_ENDPOINT", "HF_HOME", "no_proxy")
        return {name: os.environ.get(name) for name in names}

    class Teller:
        def tell(self) -> dict[str, str | None]:
            return variables()

    seen = {}
    with connect(ClusterConfig(address=cluster.address)):
        repo = Repo("generation.model", "someone/gated", None, "transformers")
        lines = tell_often()
        fetch_on_nodes([repo], num_cpus=1, num_gpus=0)
        try:
            missing = Repo("generation.model", "someone/none", None, "transformers")
            fetch_on_nodes([missing], num_cpus=1, num_gpus=0)
        except UserError as error:
            seen["refused"] = str(error)
        seen["lines"] = lines
        seen["task"] = ray.get(ray.remote(variables).remote())
        seen["actor"] = ray.get(ray.remote(Teller).remote().tell.remote())
        serve.start(proxy_location="Disabled")
        handle = serve.run(serve.deployment(Teller).bind(), name="teller", route_prefix=None)
        seen["replica"] = handle.tell.remote().result()
        serve.shutdown()
    (folder / "seen.json").write_text(json.dumps(seen))
    cluster.shutdown()
