"""A Hugging Face hub of this machine: repositories with commits, gates and private ones, over HTTP."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_fakefakefakefakefakefakefakefake"
API = re.compile(
    r"/api/(models|datasets)/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/?]+))?(?P<tree>/tree/)?"
)
FILE = re.compile(r"/(datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass
class Repository:
    """`commits`, the newest last, hold files by name; a gated one wants `TOKEN`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    access: str = "public"  # or gated, or private

    def push(self, files: dict[str, bytes]) -> str:
        name = secrets.token_hex(20)
        self.commits[name] = files
        return name

    def find(self, revision: str) -> str | None:
        if revision in (None, "main"):
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


class Hub:
    """What the server knows, and what was asked of it: `downloads` by file, `tokens` that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.downloads: Counter[str] = Counter()
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.seconds = 0.0  # that each file takes
        self.url = ""

    def add(self, name: str, folder: Path | dict[str, bytes], access: str = "public") -> Repository:
        """A repository with the files of a folder."""
        if isinstance(folder, Path):
            files = {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
        else:
            files = folder
        repository = self.repositories.setdefault(name, Repository(access=access))
        repository.push(files)
        return repository


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """A hub that listens on a port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(self.path)
            hub.tokens.add(self.headers.get("authorization"))
            if match := API.match(self.path):
                self._info(match)
            elif match := FILE.match(self.path):
                self._file(match)
            else:
                self._send(404, {"error": "not found"})

        do_HEAD = do_GET

        def _info(self, match: re.Match[str]) -> None:
            repository = self._open(match["id"], listed=True)
            if repository is None:
                return
            at = repository.find(match["revision"])
            if at is None:
                self._send(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
                return
            files = repository.commits[at]
            if match["tree"]:
                self._send(
                    200,
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                        for name, data in files.items()
                    ],
                )
                return
            siblings = [{"rfilename": name} for name in files]
            self._send(200, {"id": match["id"], "sha": at, "siblings": siblings, "tags": []})

        def _file(self, match: re.Match[str]) -> None:
            repository = self._open(match["id"], listed=False)
            if repository is None:
                return
            at = repository.find(match["revision"])
            data = repository.commits[at].get(match["name"]) if at else None
            if data is None:
                code = "EntryNotFound" if at else "RevisionNotFound"
                self._send(404, {"error": "no file"}, {"X-Error-Code": code})
                return
            if self.command == "GET":
                hub.downloads[match["name"]] += 1
                time.sleep(hub.seconds)
            self._send(200, data, {"X-Repo-Commit": at, "ETag": f'"{_etag(data)}"'})

        def _open(self, name: str, *, listed: bool) -> Repository | None:
            """The repository, where the caller may have it; a gated one tells all but its files."""
            repository = hub.repositories.get(name)
            known = self.headers.get("authorization") == f"Bearer {TOKEN}"
            if repository is None or (repository.access == "private" and not known):
                self._send(401 if not known else 404, {}, {"X-Error-Code": "RepoNotFound"})
                return None
            if repository.access == "gated" and not known and not listed:
                self._send(401, {}, {"X-Error-Code": "GatedRepo"})
                return None
            return repository

        def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:40]


@contextmanager
def patched_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub that is this process's own, with an empty cache, without any token."""
    from huggingface_hub import constants

    from ray_synth.storage.hub import commit_of

    monkeypatch.delenv("HF_TOKEN", raising=False)
    with fake_hub() as served:
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        functions = importlib.import_module("huggingface_hub.hf_api").api
        monkeypatch.setattr(functions, "endpoint", served.url)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        commit_of.cache_clear()
        yield served
        commit_of.cache_clear()
