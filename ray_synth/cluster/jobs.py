"""Jobs on a Ray cluster, by the Ray Jobs SDK: submit, follow, stop, list.

A job is one verb of `ray-synth` with its arguments. Every failure to reach the cluster is a
UserError that says what to fix; no token is ever printed.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_synth.cluster.signals import INTERRUPTED
from ray_synth.errors import UserError
from ray_synth.storage.secrets import holds_secret, redact

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
RUN = "ray_synth_run"  # the key of the run's place in a job's metadata
# Ray kills a stopped job's driver after 3 s, unless told otherwise: a run needs longer to take Serve's
# replicas down and to close its MLflow run.
STOP_WAIT_S = 120
AGENT_WAIT_S = 120  # a head is up some seconds before it takes jobs
SILENCE_S = 60.0  # a log that says nothing for so long is opened again: the connection may be dead
RECONNECT_S = 600.0


def connect_jobs(address: str | None) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address` (default: the environment's, else this
    machine's).

    Raises:
        UserError: nothing answers, the token is missing or wrong, or Ray there is another minor.
    """
    import logging

    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = find_address(address)
    require_answer(address)
    # Ray's client prefers the environment to its argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"the cluster at {address} does not take the token that it was given, or was given none: "
            "RAY_AUTH_TOKEN, or the file ~/.ray/auth_token, must hold the one that its head has"
        ) from None
    except (RuntimeError, ConnectionError, OSError) as error:
        raise UserError(f"no Ray jobs available at {address}: {error}") from None
    check_ray_version(ray.__version__, client._server_ray_version)  # no public name for it
    return client


def find_address(address: str | None) -> str:
    """The dashboard's address: as given, RAY_API_SERVER_ADDRESS, RAY_ADDRESS where that is one, or
    this machine's.

    Raises:
        UserError: it is not an http address.
    """
    fallback = os.environ.get("RAY_ADDRESS", "")
    address = (
        address
        or os.environ.get("RAY_API_SERVER_ADDRESS")
        or (fallback if fallback.startswith("http") else "")
        or DEFAULT_ADDRESS
    )
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: jobs go to the cluster's dashboard, such as {DEFAULT_ADDRESS}"
        )
    return address.rstrip("/")


def require_answer(address: str) -> None:
    """Raises UserError where no dashboard answers, or one that needs a token which is not given;
    Ray's own clients would wait, or show their insides."""
    import httpx

    try:
        response = httpx.get(f"{address}/api/version", timeout=10)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            f"no Ray dashboard answers at {address} ({error}): check --address; from outside of a "
            "cluster its port 8265 is forwarded"
        ) from None
    if response.status_code == 401 and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise UserError(
            f"the cluster at {address} asks for a token: set RAY_AUTH_MODE=token, and its token in "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )


def check_ray_version(here: str, there: str | None) -> None:
    """Raises UserError where the cluster's Ray is another minor version."""
    if there and here.split(".")[:2] != there.split(".")[:2]:
        raise UserError(
            f"the cluster runs Ray {there}, and this is Ray {here}: ray-synth wants the same minor "
            "version on both; see constraints.txt"
        )


def entrypoint(verb: str, arguments: Sequence[str]) -> str:
    """The shell command of a job, which the cluster's dashboard shows.

    Raises:
        UserError: an argument holds a secret.
    """
    for argument in arguments:
        if holds_secret(argument):
            raise UserError(
                f"{redact(argument)} holds a secret, which the cluster's dashboard would show: take it "
                "out, set its variable in the environment, and pass that on with --env NAME"
            )
    return shlex.join(["python", "-m", "ray_synth.cli", verb, *arguments])


def passed_on(names: Sequence[str]) -> dict[str, str]:
    """Values of environment variables that the user names.

    Raises:
        UserError: one is not set here, or is ray-synth's own.
    """
    from ray_synth.cluster.connection import ENVIRONMENT

    values = {}
    for name in names:
        if "=" in name:
            raise UserError(
                f"--env {name.split('=')[0]}: give the name alone; its value is read here"
            )
        if name in ENVIRONMENT:
            raise UserError(f"--env {name}: ray-synth sets it on the cluster itself")
        if name not in os.environ:
            raise UserError(f"--env {name}: no such variable here")
        values[name] = os.environ[name]
    return values


def submit(
    client: JobSubmissionClient,
    command: str,
    *,
    working_dir: Path | None,
    run: str | None,
    name: str,
    job_id: str | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """Submit a job; its id.

    Args:
        command: of the shell.
        working_dir: what to upload.
        run: where its results go: two jobs at once would disturb each other there.
        name: for the id: `<name>-<number>`, unless `job_id` is given.
        env: variables of the job; whoever may look at the cluster's dashboard can read them.

    Raises:
        UserError: a job of this run is running already, the id is taken, or the cluster refuses.
    """
    import tenacity

    jobs = client.list_jobs()
    for job in jobs:
        if run and not job.status.is_terminal() and (job.metadata or {}).get(RUN) == run:
            raise UserError(
                f"job {job.submission_id} is already running {run}: `ray-synth follow "
                f"{job.submission_id}` shows it, `ray-synth stop {job.submission_id}` ends it"
            )
    job_id = job_id or next_id(name, [str(job.submission_id) for job in jobs])
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **(env or {})}
    runtime_env: dict[str, Any] = {"env_vars": variables}
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception_message(match=r"(?s).*No available agent"),
        wait=tenacity.wait_fixed(2),
        stop=tenacity.stop_after_delay(AGENT_WAIT_S),
        reraise=True,
    )
    try:
        return attempts(
            client.submit_job,
            entrypoint=command,
            submission_id=job_id,
            runtime_env=runtime_env,
            metadata={RUN: run} if run else None,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"the cluster refused the job: {_refusal(error, env or {})}") from None


def next_id(name: str, taken: Sequence[str]) -> str:
    """`<name>-1`, `<name>-2`, ...: one more than the largest that is taken."""
    numbers = [
        int(number)
        for prefix, _, number in (job_id.rpartition("-") for job_id in taken)
        if prefix == name and number.isdigit()
    ]
    return f"{name}-{max(numbers, default=0) + 1}"


def _refusal(error: Exception, secrets: dict[str, str]) -> str:
    """The last line of what a server says, without values of the user's environment."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    line = next((part for part in reversed(text) if part.strip(" .")), text[-1])
    for name, value in secrets.items():
        line = line.replace(value, f"<{name}>") if value else line
    return redact(line)


def details(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """Raises UserError where the cluster has no such job."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        raise UserError(
            f"no job {job_id} on this cluster; `ray-synth jobs` lists those that there are"
        ) from None


def stop(client: JobSubmissionClient, job_id: str) -> JobStatus:
    """Ask a job to stop, and wait for its end; its status then.

    Raises:
        UserError: there is no such job, or it has not ended long after Ray should have killed it.
    """
    import tenacity

    if (status := details(client, job_id).status).is_terminal():
        return status
    client.stop_job(job_id)
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda status: not status.is_terminal()),
        wait=tenacity.wait_fixed(0.5),
        stop=tenacity.stop_after_delay(STOP_WAIT_S + 60),
    )
    try:
        return attempts(lambda: details(client, job_id).status)
    except tenacity.RetryError:
        raise UserError(f"job {job_id} has not stopped after {STOP_WAIT_S + 60} s") from None


def follow(
    client: JobSubmissionClient, job_id: str, *, write: Callable[[str], Any] | None = None
) -> JobDetails:
    """Pass on a job's log from its beginning until the job ends, over lost connections.

    Raises:
        UserError: there is no such job, or the cluster has not answered for `RECONNECT_S`.
        KeyboardInterrupt: the user has seen enough; the job goes on.
    """
    details(client, job_id)
    asyncio.run(_Log(client, job_id, write or _print).follow())
    return details(client, job_id)


def exit_code(job: JobDetails) -> int:
    """The entrypoint's own, where Ray tells it; 130 for a job that was stopped."""
    from ray.job_submission import JobStatus

    if job.status == JobStatus.STOPPED:
        return INTERRUPTED
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code = job.driver_exit_code or 1
    return code if code > 0 else 128 - code  # Popen gives a signal as a negative number


def outcome(job: JobDetails) -> str:
    """`job mine-1: FAILED, exit code 2`, and why it failed where its log does not say."""
    line = f"job {job.submission_id}: {job.status.value}, exit code {exit_code(job)}"
    if job.error_type and job.error_type != "JOB_ENTRYPOINT_COMMAND_ERROR":
        line += f": {redact(str(job.message))}"
    return line


def job_rows(jobs: Sequence[JobDetails]) -> list[dict[str, Any]]:
    """Submitted jobs, the newest last: `job`, `status`, `started`, `minutes` and `run`."""
    rows = []
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        if not job.submission_id:
            continue  # a driver that was not submitted
        started = (job.start_time or 0) / 1000
        ended = job.end_time / 1000 if job.end_time else time.time()
        rows.append(
            {
                "job": job.submission_id,
                "status": job.status.value,
                "started": f"{datetime.fromtimestamp(started):%Y-%m-%d %H:%M}",
                "minutes": round((ended - started) / 60, 1),
                "run": (job.metadata or {}).get(RUN, ""),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Any:
    """The same for a terminal."""
    from rich.table import Table

    made = Table()
    for column in ("job", "status", "started", "minutes", "run"):
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*map(str, row.values()))
    return made


class _Log:
    """A log that is read from its start at each connection, and printed once."""

    def __init__(
        self, client: JobSubmissionClient, job_id: str, write: Callable[[str], Any]
    ) -> None:
        self.client, self.job_id, self.write = client, job_id, write
        self.printed = 0

    async def follow(self) -> None:
        lost_at: float | None = None
        while True:
            before = self.printed
            try:
                whole = await self._stream()
                ended = (await asyncio.to_thread(details, self.client, self.job_id)).status
                if whole and ended.is_terminal():
                    return
                lost_at = None
            except UserError:
                raise
            except Exception as error:
                now = time.monotonic()
                if lost_at is None or self.printed > before:
                    lost_at = now
                    lost = f"the connection was lost ({error}); trying again"
                    print(redact(lost), file=sys.stderr)
                if now - lost_at > RECONNECT_S:
                    raise UserError(
                        f"the cluster has not answered for {RECONNECT_S:.0f} s ({error}); the job may "
                        f"go on: `ray-synth follow {self.job_id}` shows it"
                    ) from None
            await asyncio.sleep(1)

    async def _stream(self) -> bool:
        """Print what is new; True at the log's end, False where it has been silent for long."""
        at = 0
        chunks = self.client.tail_job_logs(self.job_id)
        try:
            while True:
                chunk = await asyncio.wait_for(anext(chunks, None), SILENCE_S)
                if chunk is None:
                    return True
                self.write(chunk[max(0, self.printed - at) :])
                at += len(chunk)
                self.printed = max(self.printed, at)
        except TimeoutError:
            return False
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]  # a generator, typed as an iterator


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
