"""Fixtures that start the real thing once per module: a local Ray, small image folders."""

from __future__ import annotations

import functools
import os
import random
import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from samples import ROOT, encoded

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray gives way to all others on a machine (niceness 15), and tests beside it would hold it up.
os.environ.setdefault("RAY_worker_niceness", "0")
# Processes that tests start, Ray's workers among them, must find the tests' plug-in generators.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        str(ROOT),
        *(str(ROOT / "tests" / name) for name in ("", "generation", "generators", "training")),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)


RAY_ROOMS = ("cluster", "e2e", "pipeline", "service", "jobs")
# What a shell starts in the background ignores Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine is no bug: examples may take their time.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@functools.cache
def starts_ray(file: str) -> bool:
    """Whether a test file starts Ray, in this process or in others."""
    room = Path(file).parts[1]
    return room in RAY_ROOMS or "local_ray" in (ROOT / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`: what starts Ray, file by file, in one process, and the rest in the other."""
    from xdist.scheduler import LoadScopeScheduling

    class OneRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if starts_ray(file) else file

    return OneRay(config, log)


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of this module's own, stopped after it."""
    import ray

    from ray_synth.cluster.connection import connect
    from ray_synth.config import ClusterConfig

    with connect(ClusterConfig(num_cpus=4)):
        yield ray


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A model hub of this machine, which this process takes for the only one."""
    from hubs import patched_hub

    with patched_hub(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of five images each, in three formats."""
    random.seed(0)
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            suffix, kind = [(".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP")][i % 3]
            (tmp_path / "images" / name / f"{i}{suffix}").write_bytes(encoded(10 * c + i, kind))
    return tmp_path / "images"
