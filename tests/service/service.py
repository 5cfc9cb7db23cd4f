"""Questions to a running service, and what it is asked about."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import urllib.error
import urllib.request
from typing import Any

from ray_synth.config import SourceConfig
from ray_synth.data.dataset import load_index, read_index, select

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def free_port() -> int:
    """A port that nobody listens at, below those that the system gives to whoever asks for any: Ray's
    processes would take one of those before the test does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def digit_images(name: str, count: int = 8) -> list[bytes]:
    """Encoded handwritten digits of a class."""
    index = select(load_index(SourceConfig(format="digits", split="test"), DIGITS), count, seed=0)
    rows = [row for row in read_index(index) if row["class_index"] == DIGITS.index(name)]
    return [row["image"] for row in rows]


def send(
    url: str, path: str, body: object = None, raw: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a GET, or of a POST where there is a body."""
    data = raw if raw is not None else (None if body is None else json.dumps(body).encode())
    request = urllib.request.Request(
        url + path, data, {"content-type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=180) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def ask(url: str, path: str, body: object = None, raw: bytes | None = None) -> tuple[int, Any]:
    status, _, answer = send(url, path, body, raw)
    return status, json.loads(answer)


def memory_of_workers() -> int:
    """Bytes of memory that this Ray's worker processes hold."""
    import psutil

    own = [p for p in psutil.process_iter(["cmdline"]) if _is_replica(p)]
    return sum(process.memory_info().rss for process in own)


def _is_replica(process: Any) -> bool:
    return bool(process.info["cmdline"]) and "ServeReplica" in process.info["cmdline"][0]


CHROMIUM = next(
    (path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if os.path.exists(path)),
    None,
)
