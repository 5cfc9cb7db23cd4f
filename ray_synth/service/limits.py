"""What strangers may send: bytes, counts, decoded pixels, hosts, seconds; and how images are read."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import urlsplit

from pydantic import Field

from ray_synth.config import Section
from ray_synth.errors import UserError


class Limits(Section):
    """What one request may bring, and take."""

    max_body_bytes: int = Field(32_000_000, ge=1)
    max_classes: int = Field(1000, ge=1)
    max_images: int = Field(64, ge=1, description="per class")
    max_image_bytes: int = Field(10_000_000, ge=1)
    max_pixels: int = Field(50_000_000, ge=1)
    max_prompts: int = Field(200, ge=1)
    timeout_s: float = Field(120, gt=0, description="for one class; a batch has it for each")
    max_queued_requests: int = Field(
        1024, ge=1, description="in work or waiting, of one replica of the ingress; beyond: 503"
    )
    max_bytes_in_flight: int = Field(
        256_000_000, ge=1, description="bodies of all requests together; beyond: 503, come again"
    )
    body_timeout_s: float = Field(
        20, gt=0, description="how long a body may stand still, or come at under 64 kB/s"
    )
    decode_bytes: int = Field(
        1_000_000_000, ge=1, description="memory for images that are decoded at the same time"
    )
    hostnames: list[str] = Field(
        default_factory=list,
        description="names, beside localhost, under which a gateway on this machine asks",
    )
    allowed_hosts: list[str] = Field(
        default_factory=list, description="hosts whose https images are fetched; none by default"
    )


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
