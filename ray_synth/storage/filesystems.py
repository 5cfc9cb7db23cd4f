"""File systems by URI: s3://, gs:// and abfs:// through pyarrow, any other scheme through fsspec.

Credentials come from the environment, or from the machine's role, and never from a URI: that is written
to config.yaml, to logs and to MLflow. What a storage answers is told in the user's words here.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import tenacity

from ray_synth import metrics
from ray_synth.errors import UserError
from ray_synth.storage.secrets import CREDENTIALS, SAME, redact, refuse_secrets

if TYPE_CHECKING:
    import pyarrow.fs as pafs

log = logging.getLogger("ray_synth")
PATIENCE_S = 600  # how long a storage that does not answer is waited for
AT_ONCE = 32  # requests of one process: an object store answers each in tens of milliseconds
T = TypeVar("T")
S = TypeVar("S")
# Whoever opens a file system again must see these as they were: they are part of the cache's key.
ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION",
    "GOOGLE_APPLICATION_CREDENTIALS", "CLOUD_STORAGE_EMULATOR_ENDPOINT",
    "AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN",
)  # fmt: skip
# Errors of a mounted file system that another try may fix; it does not fix a full or read-only disk.
PASSING = {
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EPIPE,
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN,
}  # fmt: skip
MISSING = re.compile(
    r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '.*' not found|bucket does not exist|ContainerNotFound"
    r"|container does not exist",
    re.IGNORECASE,
)
DENIED = re.compile(
    r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH"
    r"|SignatureDoesNotMatch|EXPIRED_TOKEN|ExpiredToken|INVALID_CLIENT_TOKEN_ID|MISSING_AUTH"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|AuthenticationFailed|AuthorizationFailure"
    r"|AuthorizationPermissionMismatch|AuthenticationException|NoCredentials|HTTP.{0,12}40[13]",
)
SILENT = re.compile(
    r"NETWORK_CONNECTION|Could not (connect|resolve)|UNAVAILABLE|Connection refused|timed? ?out"
    r"|Fail to get a new connection|TransportException",
    re.IGNORECASE,
)
BROKEN = re.compile(
    r"thrift|magic bytes|corrupt|decompress|parquet file size is|checksum|page integrity|end of stream"
    r"|unexpected end|out of range|invalid number|malloc of size",
    re.IGNORECASE,
)


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path as that file system knows it.

    Raises:
        UserError: an unknown scheme or option, a package that is missing, no bucket in the URI, or a
            secret in it.
        OSError: the storage does not answer.
    """
    uri = refuse_secrets(without_file_scheme(uri))
    if "://" not in uri:
        import pyarrow.fs as pafs

        return pafs.LocalFileSystem(), uri
    address, mark, options = uri.partition("?")
    scheme, _, rest = address.partition("://")
    authority, _, inside = rest.partition("/")
    environment = tuple(os.environ.get(name) for name in ENVIRONMENT)
    filesystem, base = _open_root(scheme.lower(), authority, mark + options, environment)
    inside = inside.rstrip("/")
    return filesystem, f"{base.rstrip('/')}/{inside}" if inside else base


def without_file_scheme(uri: str) -> str:
    """`file:///a%20b` as `/a b`; all else as it is."""
    if not uri.startswith("file://"):
        return uri
    return urllib.request.url2pathname(urllib.parse.urlsplit(uri).path)


@lru_cache(maxsize=64)
def _open_root(
    scheme: str, authority: str, options: str, environment: tuple[str | None, ...]
) -> tuple[pafs.FileSystem, str]:
    """What a bucket's or a server's root is; opened once per process: a client keeps its connections
    and what it was told about credentials."""
    import pyarrow as pa
    import pyarrow.fs as pafs

    root = f"{scheme}://{authority}{options}"
    kind = SAME.get(scheme, scheme)
    if kind in CREDENTIALS and not authority:
        raise UserError(f"{scheme}:// names no bucket: give {scheme}://BUCKET/FOLDER")
    try:
        if kind == "abfs":
            return _open_azure(authority, options)
        if kind in ("s3", "gs"):
            # A small object is then one request, in place of three.
            more = ("&" if options else "?") + "allow_delayed_open=true" if kind == "s3" else ""
            return pafs.FileSystem.from_uri(f"{kind}://{authority}{options}{more}")
        if kind in ("hdfs", "viewfs"):
            return pafs.FileSystem.from_uri(root)
        import fsspec

        found, path = fsspec.core.url_to_fs(root)
        return pafs.PyFileSystem(pafs.FSSpecHandler(found)), path
    except ImportError as error:
        raise UserError(f"cannot open {root}: {error}") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and kind in CREDENTIALS and SILENT.search(str(error)):
            raise  # it may answer later: for `patiently`
        raise UserError(f"cannot open {root}: {storage_problem(error, root) or error}") from None


def _open_azure(authority: str, options: str) -> tuple[pafs.FileSystem, str]:
    """`container@account[.dfs.core.windows.net]`, with `?endpoint_override=` for an emulator.

    pyarrow's own reading of such a URI takes no key from the environment.
    """
    import pyarrow.fs as pafs

    container, _, host = authority.partition("@")
    account = host.split(".")[0] or os.environ.get("AZURE_STORAGE_ACCOUNT", "")
    if not account:
        raise UserError(
            "it names no storage account: give abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/FOLDER, "
            "or set AZURE_STORAGE_ACCOUNT"
        )
    given = dict(urllib.parse.parse_qsl(options.lstrip("?")))
    endpoint, scheme = given.pop("endpoint_override", None), given.pop("scheme", None)
    if given:
        raise UserError(f"unknown option {min(given)!r}; known: endpoint_override, scheme")
    return pafs.AzureFileSystem(
        account,
        account_key=os.environ.get("AZURE_STORAGE_KEY"),
        sas_token=os.environ.get("AZURE_STORAGE_SAS_TOKEN"),
        blob_storage_authority=endpoint,
        dfs_storage_authority=endpoint,
        blob_storage_scheme=scheme,
        dfs_storage_scheme=scheme,
    ), container


def storage_problem(error: BaseException, uri: str = "") -> str | None:
    """What a storage's error means and what fixes it; None for an unusual one."""
    text = str(error)
    kind = SAME.get(scheme := uri.partition("://")[0].lower(), scheme)
    if not uri:
        marks = {"AWS Error": "s3", "google::cloud": "gs", "Azure": "abfs"}
        kind = next((kind for mark, kind in marks.items() if mark in text), "")
    if MISSING.search(text):
        return f"the bucket does not exist ({_first(text)}): a run makes none, create it first"
    if DENIED.search(text):
        names = CREDENTIALS.get(kind, "the credentials")
        return (
            f"access denied ({_first(text)}): set {names}, on all nodes, or give the machines a role "
            "that may read, write, list and delete there"
        )
    if kind and SILENT.search(text):
        variable = "AWS_ENDPOINT_URL or " if kind == "s3" else ""
        return (
            f"no answer ({_first(text)}): check the network, and {variable}?endpoint_override= where the "
            "storage is not the cloud's own"
        )
    return None


def _first(text: str) -> str:
    """The first line of an error, cut: some clients add their whole history."""
    line = redact(text.strip().splitlines()[0]) if text.strip() else "no reason given"
    return line if len(line) <= 200 else line[:200] + "…"


def at_once(work: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """The results of many waits for a storage, `AT_ONCE` at a time, in order."""
    items = list(items)
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(work, items))


def patiently(work: Callable[[], T], *, remote: bool = True) -> T:
    """Do some input or output; a storage that does not answer is tried again for `PATIENCE_S`.

    What waiting would not fix is raised at once: a full disk, a missing or broken file, a bucket that
    is forbidden or does not exist.

    Args:
        remote: clients of object stores give no error number; on a mounted file system, an error
            without one is not the storage's fault.
    """

    def may_pass(error: BaseException) -> bool:
        if not isinstance(error, OSError) or isinstance(
            error, FileNotFoundError | PermissionError | UserError
        ):
            return False
        if error.errno is not None:
            return error.errno in PASSING
        text = str(error)
        return remote and not any(p.search(text) for p in (MISSING, DENIED, BROKEN))

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
        stop=tenacity.stop_after_delay(PATIENCE_S),
        before_sleep=_tell_retry,
        reraise=True,
    )
    return retrying(work)


def _tell_retry(state: tenacity.RetryCallState) -> None:
    metrics.record("storage_retries_total", 1)
    tenacity.before_sleep_log(log, logging.WARNING)(state)
