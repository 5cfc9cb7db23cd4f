"""A Hugging Face hub of this machine: repositories with commits, gates and private ones, over HTTP."""

from __future__ import annotations

import base64
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
PREUPLOAD = re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/preupload/main")
COMMIT = re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/commit/main")
LFS = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/?]+))?(?P<tree>/tree/)?"
)
FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"
)


@dataclass
class Repository:
    """`commits`, the newest last, hold files by name; a gated one wants `TOKEN`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    access: str = "public"  # or gated, or private
    pushed: bool = False  # made by a client

    def push(self, files: dict[str, bytes]) -> str:
        name = secrets.token_hex(20)
        self.commits[name] = files
        return name

    def find(self, revision: str) -> str | None:
        if revision in (None, "main"):
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


class Hub:
    """What the server knows, and what was asked of it: `downloads` by file, `tokens` that came.

    Attributes:
        repositories: by id; of data sets that were pushed, `datasets/` and the id.
        uploads: names of files as they were sent, one by one or in a commit.
        large: bytes from which a file goes by LFS.
        failing: commits that are refused before the next is taken.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.downloads: Counter[str] = Counter()
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.seconds = 0.0  # that each file takes
        self.url = ""
        self.uploads: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.large = 10**9
        self.failing: list[int] = []  # status of each commit to come; 0 is taken

    def find(self, match: re.Match[str]) -> Repository | None:
        """The repository that a request is about."""
        kind = "datasets/" if (match["kind"] or "").startswith("datasets") else ""
        found = self.repositories.get(f"{kind}{match['id']}")
        other = self.repositories.get(match["id"])
        return found or (None if other is not None and other.pushed and kind else other)

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
            if self.path == "/api/whoami-v2":
                known = self.headers.get("authorization") == f"Bearer {TOKEN}"
                self._send(200 if known else 401, {"name": "me", "type": "user"} if known else {})
            elif match := API.match(self.path):
                self._info(match)
            elif match := FILE.match(self.path):
                self._file(match)
            else:
                self._send(404, {"error": "not found"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            hub.requests.append(self.path)
            hub.tokens.add(self.headers.get("authorization"))
            if self.headers.get("authorization") != f"Bearer {TOKEN}":
                self._send(401, {"error": "no token that may write"})
            elif self.path == "/api/validate-yaml":
                self._send(200, {"errors": [], "warnings": []})
            elif self.path == "/api/repos/create":
                self._send(*_create(hub, json.loads(body)))
            elif match := PREUPLOAD.match(self.path):
                self._send(*_preupload(hub, match, json.loads(body)))
            elif match := LFS.match(self.path):
                self._send(*_lfs(hub, json.loads(body)))
            elif match := COMMIT.match(self.path):
                self._send(*_commit(hub, match, [json.loads(line) for line in body.splitlines()]))
            else:
                self._send(404, {"error": "not found"})

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(data).hexdigest() == oid
            hub.objects[oid] = data
            hub.uploads.append(oid)
            self._send(200, {})

        def _info(self, match: re.Match[str]) -> None:
            repository = self._open(match, listed=True)
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
            about = {"id": match["id"], "sha": at, "siblings": siblings, "tags": []}
            self._send(200, {**about, "private": repository.access == "private"})

        def _file(self, match: re.Match[str]) -> None:
            repository = self._open(match, listed=False)
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

        def _open(self, match: re.Match[str], *, listed: bool) -> Repository | None:
            """The repository, where the caller may have it; a gated one tells all but its files."""
            repository = hub.find(match)
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
            if self.command != "HEAD":
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


def _create(hub: Hub, wanted: dict[str, Any]) -> tuple[int, Any]:
    if wanted["organization"] != "me":
        return 403, {"error": "not of this organisation"}
    kind = "datasets/" if wanted.get("type") == "dataset" else ""
    name = f"{kind}me/{wanted['name']}"
    if name in hub.repositories:
        return 409, {"error": "there is one", "url": f"{hub.url}/{name}"}
    hub.repositories[name] = Repository(access=wanted.get("visibility", "public"), pushed=True)
    hub.repositories[name].push({".gitattributes": b""})
    return 200, {"url": f"{hub.url}/{name}", "name": name}


def _preupload(hub: Hub, match: re.Match[str], asked: dict[str, Any]) -> tuple[int, Any]:
    """How each file is to be sent, and what the repository has of it."""
    repository = hub.find(match)
    if repository is None:
        return 404, {"error": "no repository"}
    there = list(repository.commits.values())[-1]
    files = []
    for file in asked["files"]:
        large = file["size"] >= hub.large
        data = there.get(file["path"])
        oid = None if data is None else hashlib.sha256(data).hexdigest() if large else _blob(data)
        mode = "lfs" if large else "regular"
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return 200, {"files": files}


def _lfs(hub: Hub, asked: dict[str, Any]) -> tuple[int, Any]:
    objects = []
    for wanted in asked["objects"]:
        found = dict(wanted)
        if wanted["oid"] not in hub.objects:
            found["actions"] = {"upload": {"href": f"{hub.url}/objects/{wanted['oid']}"}}
        objects.append(found)
    return 200, {"transfer": "basic", "objects": objects}


def _commit(hub: Hub, match: re.Match[str], lines: list[dict[str, Any]]) -> tuple[int, Any]:
    status = hub.failing.pop(0) if hub.failing else 0
    repository = hub.find(match)
    if status or repository is None:
        return status or 404, {"error": "the commit is refused"}
    files = dict(list(repository.commits.values())[-1])
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
            hub.uploads.append(value["path"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        else:
            assert line["key"] == "deletedFile"
            files.pop(value["path"], None)
    oid = repository.push(files)
    return 200, {"commitUrl": f"{hub.url}/{match['id']}/commit/{oid}", "commitOid": oid}


def _blob(data: bytes) -> str:
    """What git calls a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


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
