"""The service over HTTP, with its real models, while someone does not play fair."""

import base64
import contextlib
import http.client
import io
import json
import socket
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from service import ask, send

from ray_synth.config import ClipConfig
from ray_synth.data.images import decode_image
from ray_synth.service.clip_deployment import ClipDeployment


def raw(url: str, text: bytes, timeout: float = 30) -> socket.socket:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=timeout)
    connection.sendall(text)
    return connection


def head(path: str, length: int, host: str = "localhost", **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join([*lines, "Content-Type: application/json", "", ""])).encode()


def test_hundreds_of_connections_that_stop_take_nothing_from_others(url, sevens):
    """Six hundred were enough to take down health, readiness and questions."""
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            stalled = raw(url, head("/disambiguate", 30_000) + b'{"cla')
            stack.callback(stalled.close)
        for path in ("/healthz", "/readyz", "/limits"):
            started = time.monotonic()
            assert ask(url, path)[0] == 200
            assert time.monotonic() - started < 5
        body = {"class_name": "seven", "images": sevens[:1], "meanings": ["a digit"]}
        assert ask(url, "/disambiguate", {**body, "num_meanings": 0})[0] == 200


def test_an_id_that_is_none_is_neither_kept_nor_a_failure(url):
    parts = urlsplit(url)
    for bad in (b"x" * 5000, b"\xff\xfe\xfd", b"two words", b"<script>"):
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        connection.request("POST", "/disambiguate", b"{}", {"x-request-id": bad.decode("latin-1")})
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 422
        assert response.headers["x-request-id"] == answer["request_id"]
        assert len(answer["request_id"]) < 50
        connection.close()


def test_under_a_foreign_name_the_loopback_service_answers_nothing(url):
    for path in ("/", "/limits", "/healthz", "/models"):
        status, _, answer = send(url, path, Host="rebound.example")
        assert (status, json.loads(answer)["status"]) == (421, 421)
    assert send(url, "/healthz", Host="localhost")[0] == 200


def test_the_operations_are_a_page_that_loads_nothing(url):
    status, headers, page = send(url, "/docs")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'none'")
    text = page.decode()
    assert "//" not in text.replace("https URL", "") and "<script" not in text
    for said in ("POST /disambiguate/batch", "num_meanings", "GET /readyz", "context"):
        assert said in text
    assert ask(url, "/openapi.json")[1]["openapi"]


def test_a_refusal_comes_before_the_body_does(url):
    with contextlib.closing(raw(url, head("/disambiguate", 100_000_000) + b"{" * 1000)) as slow:
        assert slow.recv(100).startswith(b"HTTP/1.1 413")


@pytest.fixture(scope="module")
def clip():
    deployment = ClipDeployment.func_or_class
    return deployment(ClipConfig(cache_images=0), 50_000_000, 80_000_000)


def saved(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def test_large_pictures_are_decoded_within_a_budget_and_in_turns(clip):
    import asyncio

    most = 0

    class Watched(type(clip.room)):
        def _let_in(self):
            nonlocal most
            super()._let_in()
            most = max(most, self.inside if self.count > 1 else 0)

    clip.room.__class__ = Watched
    images = [saved(Image.new("P", (4000 + i, 2500))) for i in range(8)]
    small = saved(Image.new("RGB", (60, 60), "red"))
    done: list[str] = []

    async def one(name, data, caller):
        found = await clip.encode_images(data, caller)
        assert isinstance(found, np.ndarray)
        done.append(name)

    async def run():
        much = asyncio.create_task(one("much", images, ("a", 1)))
        await asyncio.sleep(0.01)
        await one("little", [small], ("b", 2))
        await much

    asyncio.run(run())
    assert done == ["little", "much"]
    assert most <= 80_000_000


def test_a_picture_made_smaller_as_it_is_decoded_is_the_same_to_the_model(clip):
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((1600, 1200))
    for image_format in ("PNG", "JPEG"):
        data = saved(blobs, image_format)
        whole = clip.clip.encode_images([decode_image(data)])
        small = clip.clip.encode_images([decode_image(data, enough=2 * clip.clip.image_size)])
        assert float((whole * small).sum()) > 0.99


def test_what_is_wrong_with_a_picture_is_said_without_a_turn(clip):
    import asyncio

    said = asyncio.run(clip.encode_images([base64.b64decode("aGVsbG8=")], ("a", 1)))
    assert said.startswith("images[0]: not a readable image")
