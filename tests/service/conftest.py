"""One running service for all tests of the app: it takes 20 seconds to start."""

from __future__ import annotations

import base64
import contextlib

import pytest
from service import digit_images, free_port

from ray_synth.config import ClipConfig, ClusterConfig, LlmConfig


@pytest.fixture(scope="package")
def url(tmp_path_factory):
    """The app over HTTP, with its real models and small limits."""
    from ray import serve

    from ray_synth.cluster.connection import connect
    from ray_synth.service.app import ServeConfig, build
    from ray_synth.service.limits import Limits
    from ray_synth.service.request_ids import PROXY_CALLBACK

    port = free_port()
    cache = tmp_path_factory.mktemp("answers")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name, value in PROXY_CALLBACK.items():  # as `ray-synth serve run` does
            patch.setenv(name, value)
        stack.enter_context(connect(ClusterConfig(num_cpus=4)))
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        config = ServeConfig(
            lexicon="off",  # the same where WordNet is installed and where not
            llm=LlmConfig(num_cpus=0.5, cache_dir=str(cache)),
            clip=ClipConfig(num_cpus=0.5),
            limits=Limits(
                max_body_bytes=2_000_000, max_images=20, max_classes=20, max_pixels=1_000_000
            ),
        )
        serve.run(build(config), name="test", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


@pytest.fixture(scope="package")
def sevens() -> list[str]:
    return [base64.b64encode(data).decode() for data in digit_images("seven")]
