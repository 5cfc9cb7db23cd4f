"""What strangers may send: bytes, counts, decoded pixels, hosts, seconds; and how images are read."""

from __future__ import annotations

import base64
import binascii
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from ray_synth.config import Section
from ray_synth.errors import UserError
from ray_synth.service.problems import problem_response


class Limits(Section):
    """What one request may bring, and take."""

    max_body_bytes: int = Field(32_000_000, ge=1)
    max_classes: int = Field(1000, ge=1)
    max_images: int = Field(64, ge=1, description="per class")
    max_image_bytes: int = Field(10_000_000, ge=1)
    max_pixels: int = Field(50_000_000, ge=1)
    max_prompts: int = Field(200, ge=1)
    timeout_s: float = Field(120, gt=0, description="for one class; a batch has it for each")
    max_queued_requests: int = Field(1024, ge=1, description="beyond: 503, come again")
    allowed_hosts: list[str] = Field(
        default_factory=list, description="hosts whose https images are fetched; none by default"
    )


class BodyLimit:
    """ASGI middleware: 413 for a body over the limit, whether or not it announces its length.

    The limit belongs to the class: Serve copies the FastAPI app before the config is known.
    """

    limit = Limits().max_body_bytes

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.limit:
            return await self._refuse(scope, receive, send, more=True)
        chunks: list[Any] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                chunks.append(message)
                break
            size += len(message.get("body", b""))
            if size > self.limit:
                return await self._refuse(scope, receive, send, message.get("more_body", False))
            chunks.append(message)
            more = message.get("more_body", False)

        async def replay() -> Any:
            return chunks.pop(0) if chunks else await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any, more: bool) -> None:
        # Read on and forget, within reason: a client that is still sending would see a broken
        # connection instead of the answer.
        for _ in range(100_000 if more else 0):
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        text = f"the body is over the limit of {self.limit:,} bytes: send fewer or smaller images"
        await problem_response(413, text)(scope, receive, send)


async def read_images(images: list[str], limits: Limits) -> list[bytes]:
    """The encoded images of a request.

    Raises:
        UserError: naming the image: not base64, too large, or a URL that is not allowed or fails.
    """
    if len(images) > limits.max_images:
        raise UserError(f"images: {len(images)} given, at most {limits.max_images}")
    found = []
    for position, text in enumerate(images):
        try:
            data = await _fetch(text, limits) if "://" in text[:10] else _decode(text)
            if len(data) > limits.max_image_bytes:
                raise UserError(
                    f"{len(data):,} bytes is over the limit of {limits.max_image_bytes:,}"
                )
        except UserError as error:
            raise UserError(f"images[{position}]: {error}") from None
        found.append(data)
    return found


def _decode(text: str) -> bytes:
    payload = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("not base64") from None


async def _fetch(url: str, limits: Limits) -> bytes:
    """An image from an allowed host, over https, without following redirects elsewhere."""
    import httpx

    try:
        parts = urlsplit(url)
        host, scheme = parts.hostname or "", parts.scheme
    except ValueError:
        raise UserError("not a URL") from None
    if scheme != "https" or host not in limits.allowed_hosts or parts.username is not None:
        raise UserError(
            "URLs are fetched over https from the hosts in limits.allowed_hosts alone "
            f"({', '.join(limits.allowed_hosts) or 'none'}): send the image itself, as base64"
        )
    data = bytearray()
    try:
        async with (
            httpx.AsyncClient(follow_redirects=False, timeout=10) as client,
            client.stream("GET", url) as response,
        ):
            if response.status_code != 200:
                raise UserError(f"{host} answered {response.status_code}")
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > limits.max_image_bytes:
                    break
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"{host} cannot be read ({type(error).__name__})") from None
    return bytes(data)
