"""The pipelines' apps on a cluster that others use too: whose they are, and when Serve may be stopped."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from typing import Any

import tenacity

log = logging.getLogger("ray_synth")
APP_NAME = "ray-synth-pipeline"
STARTS = 4  # of an app whose Serve is stopped by another driver's end at that moment


def app_name(run: str) -> str:
    """The app of this driver: the run's name is for people, the number of the job makes it one's own."""
    import ray

    return f"{APP_NAME}-{run}-{ray.get_runtime_context().get_job_id()}"


def is_ours(app: str, others: set[str]) -> bool:
    """Whether an app is this driver's, or was left behind by a pipeline's driver that is gone.

    Args:
        others: see `other_jobs`.
    """
    if app == APP_NAME:  # as versions named it in which all drivers shared one app
        return not others
    found = re.fullmatch(rf"{APP_NAME}-.*-([0-9a-f]+)", app)
    return found is not None and found[1] not in others


def other_jobs() -> set[str]:
    """Numbers of the drivers that are connected to this cluster, without this one."""
    import ray
    from ray._private.state import jobs

    living = {job["JobID"] for job in jobs() if not job["IsDead"]}
    return living - {ray.get_runtime_context().get_job_id()}


def remove_left_behind() -> None:
    """Take down apps of pipelines whose driver was killed: their replicas hold CPUs and GPUs."""
    if not serve_is_running():
        return
    import ray
    from ray import serve

    others, own = other_jobs(), ray.get_runtime_context().get_job_id()
    with suppress(*gone()):
        for name in list(serve.status().applications):
            if is_ours(name, others) and not name.endswith(f"-{own}"):
                log.info("taking down %s, which a killed run left behind", name)
                serve.delete(name)


def take_down(name: str) -> None:
    """Delete an app, and stop Serve where that was the last and a pipeline had started it.

    An operator's Serve has proxies, a pipeline's has none.
    """
    if not serve_is_running():
        return
    from ray import serve

    with suppress(*gone()):
        serve.delete(name)
        status = serve.status()
        if not status.applications and not status.proxies:
            serve.shutdown()


def start_serve(config: Any, name: str) -> Any:
    """The handle of our app, deployed under a name; Serve is started where it is not running."""
    from ray import serve

    from ray_synth.service.app import build

    for attempt in tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(gone()),
        stop=tenacity.stop_after_attempt(STARTS),
        wait=tenacity.wait_random(0.5, 3),
        reraise=True,
    ):
        with attempt:
            if not serve_is_running():
                serve.start(proxy_location="Disabled")
            logging.getLogger("ray.serve").setLevel(logging.ERROR)  # after start, which sets it
            return serve.run(build(config), name=name, route_prefix=None)
    raise AssertionError("unreachable")


def gone() -> tuple[type[Exception], ...]:
    """What is raised where another driver stops Serve at that moment."""
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import RayServeException

    return RayActorError, RayServeException


def serve_is_running() -> bool:
    """Whether a Serve instance is up on this cluster, whoever started it."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True
