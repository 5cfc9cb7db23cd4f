"""Joins the Ray cluster that there is, or starts one on this machine for the length of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_synth.config import ClusterConfig
from ray_synth.storage import Folder

log = logging.getLogger("ray_synth")
# Ray's and MLflow's usage reports would wait for a network that a laptop may not have.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """A connection to Ray for the length of the block.

    A local Ray gets at least 4 logical CPUs: on a small laptop stages then share the cores, instead
    of waiting for each other for ever. It is stopped at the end; a cluster that was joined stays.

    Raises:
        ValueError: no cluster answers at the address.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    import ray

    from ray_synth.generation.stream import set_context

    if ray.is_initialized():
        set_context(config)
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        if address:
            ray.init(address=address, **options)
        else:
            ray.init(
                address="local",
                num_cpus=config.num_cpus or max(os.cpu_count() or 1, 4),
                num_gpus=config.num_gpus,
                include_dashboard=False,
                **options,
            )
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise ValueError(
            f"no Ray cluster to be had at {address or 'this machine'}: {error}; check cluster.address"
            " and RAY_ADDRESS (a cluster with token authentication wants RAY_AUTH_MODE=token and "
            "the token on both sides)"
        ) from None
    try:
        set_context(config)
        yield
    finally:
        ray.shutdown()


def runs_folder(runs_dir: str) -> Folder:
    """The folder of all runs.

    Inside a submitted job the working directory is an upload that Ray deletes; a relative path would
    be lost with it, and means a folder in the home directory there.
    """
    if "://" in runs_dir or Path(runs_dir).expanduser().is_absolute():
        return Folder(runs_dir)
    if "runtime_resources/working_dir_files" in str(Path.cwd()):
        folder = Folder(Path.home() / "ray-synth" / runs_dir)
        log.warning(
            "runs_dir %r is relative, and this is an uploaded job: using %s", runs_dir, folder.uri
        )
        return folder
    return Folder(runs_dir)
