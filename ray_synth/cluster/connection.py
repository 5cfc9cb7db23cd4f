"""Joins the Ray cluster that there is, or starts one on this machine for the length of a run."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray_synth.cluster.signals import own_handlers
from ray_synth.cluster.startup import patient, quiet_terminal
from ray_synth.config import ClusterConfig
from ray_synth.errors import UserError
from ray_synth.monitoring import logs
from ray_synth.storage.folder import Folder
from ray_synth.storage.hub import PASSED_ON

log = logging.getLogger("ray_synth")
STARTS = 3  # of a local Ray; each is waited for as long as it makes progress
NOISY = (
    "ray.data",
    "ray.serve",
    "ray.train",
    "ray._private.authentication",
    "mlflow",
    "mlflow.store.db.utils",
    "alembic",
)
ENVIRONMENT = {
    # Threads that wait must sleep: several torch processes share a laptop's cores, and with spinning
    # threads generation under Ray was 7 times slower there (3.6 against 25.8 images/s).
    "OMP_WAIT_POLICY": "PASSIVE",
    # Usage reports would wait for a network that a laptop may not have.
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that is gone costs seconds, not the minutes of the default.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "DO_NOT_TRACK": "1",
    # How often Ray Train looks at its workers: with its 2 s, a checkpoint every second cannot be kept.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # What Ray tries again by itself, as at each end of Serve, and how many processes it has started are
    # nothing that a user could do something about.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "There are infinite retries remaining"
    "|PYTHON worker processes have been started",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """A connection to Ray for the length of the block.

    A local Ray gets at least 4 logical CPUs: on a small laptop stages then share the cores, instead
    of waiting for each other forever. It is stopped at the end; a cluster that was joined stays.

    Raises:
        UserError: no cluster answers at the address.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray
    import ray.data

    logs.adopt("ray")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)

    if ray.is_initialized():
        _set_data_context(config)
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        _require_answer(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address:
        options |= {"address": address, "runtime_env": {"env_vars": ENVIRONMENT, **_hub_access()}}
    else:
        options |= {
            "address": "local",
            "num_cpus": config.num_cpus or max(os.cpu_count() or 1, 4),
            "num_gpus": config.num_gpus,
            "include_dashboard": False,
        }
    with quiet_terminal():
        yield from _connected(config, address, options)


def _connected(
    config: ClusterConfig, address: str | None, options: dict[str, Any]
) -> Iterator[None]:
    """Connect, yield once, and disconnect."""
    import ray

    try:
        with own_handlers():
            _start(options)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise UserError(
            f"no Ray cluster available at {address or 'this machine'}: {error}; check cluster.address"
            " and RAY_ADDRESS (a cluster with token authentication needs RAY_AUTH_MODE=token and "
            "the token on both sides)"
        ) from None
    logs.adopt("ray")  # ray.init gave it a new format
    try:
        _set_data_context(config)
        yield
    finally:
        ray.shutdown()


def _hub_access() -> dict[str, Any]:
    """What a joined cluster's workers run first: they reach the hub as this process does.

    Ray writes the `env_vars` of a runtime environment to its logs on every node, tokens and all; a hook
    travels through the memory of its head alone. (A local Ray's workers inherit this environment.)
    """
    values = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if not values:
        return {}

    def take_hub_access() -> None:
        os.environ.update(values)

    return {"worker_process_setup_hook": take_hub_access}


def _start(options: dict[str, Any]) -> None:
    """`ray.init`, waited for as long as it makes progress, and again where it hangs or has died.

    Raises:
        UserError: it did not start in `STARTS` attempts.
    """
    import psutil
    import ray

    before = set(psutil.Process().children(recursive=True))
    started = time.monotonic()
    for _ in range(STARTS):
        try:
            with patient(before):
                ray.init(**options)
            return
        except Exception as error:  # Ray raises no class of its own for this
            if "timed out during startup" not in str(error):
                raise
        for child in set(psutil.Process().children(recursive=True)) - before:
            with suppress(psutil.NoSuchProcess):
                if any("ray" in word for word in child.cmdline()):
                    child.kill()  # half a cluster, which would go on starting beside the next
        log.warning("Ray did not start in %d s; trying again", time.monotonic() - started)
    raise UserError(
        f"Ray did not start on this machine in {STARTS} attempts: the machine is too busy, or short of "
        "memory; run the same command again when it is not"
    )


def _require_answer(address: str) -> None:
    """Raises UserError where nothing listens at `host:port`; Ray itself would try for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(
            f"no Ray cluster available at {address} ({error}): check cluster.address and RAY_ADDRESS"
        ) from None


def _set_data_context(config: ClusterConfig) -> None:
    """No bars of Ray Data's own (the run draws its own), and no silent stall: a pipeline in which
    nothing moves for `no_progress_timeout_s` raises."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = config.no_progress_timeout_s


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
