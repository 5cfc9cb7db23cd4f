"""Clouds' notices, from metadata services that answer as theirs are documented to."""

import threading
import time
from http.server import ThreadingHTTPServer

import pytest
from metadata import QUIET_ASKS, Metadata, metadata_service

from ray_synth.cluster.preemption import GCP_NOTICE_S, MARGIN_S, main, node_here, watch


@pytest.mark.parametrize(
    ("cloud", "seconds"), [("aws", 120), ("gcp", GCP_NOTICE_S), ("azure", 30), ("azure", 2)]
)
def test_a_notice_is_told_once_with_the_time_that_is_left(cloud, seconds):
    told = []
    with metadata_service(seconds) as (server, url):
        watch(cloud, told.append, url=url, poll_s=0.01)
    assert server.asks > QUIET_ASKS
    (left,) = told
    assert max(0, seconds - MARGIN_S - 3) <= left <= max(0, seconds - MARGIN_S)


def test_a_service_that_is_away_for_a_while_is_asked_again():
    told = []
    with metadata_service(120) as (server, url):
        server.asks = -200
        port = server.server_port
        watcher = threading.Thread(
            target=watch, args=("gcp", told.append), kwargs={"url": url, "poll_s": 0.01}
        )
        watcher.start()
        deadline = time.monotonic() + 30
        while server.asks == -200 and time.monotonic() < deadline:
            time.sleep(0.01)
    time.sleep(0.1)
    assert watcher.is_alive()
    back = ThreadingHTTPServer(("127.0.0.1", port), Metadata)
    back.asks = QUIET_ASKS
    threading.Thread(target=back.serve_forever, daemon=True).start()
    watcher.join(30)
    back.shutdown()
    back.server_close()
    assert len(told) == 1


def test_another_cloud_s_machine_is_refused(capsys):
    with metadata_service(60) as (_, url), pytest.raises(SystemExit, match="no metadata service"):
        main(["aws", "--address=x", "--node-id=1", f"--metadata-url={url}/elsewhere"])


@pytest.mark.slow
def test_the_node_of_this_machine_is_found(local_ray):
    context = local_ray.get_runtime_context()
    assert node_here(context.gcs_address) == context.get_node_id()
