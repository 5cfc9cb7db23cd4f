"""Ids of requests: a caller's own is kept where it is one, short and of plain characters.

Ray Serve's proxy reads a caller's `x-request-id` before any code of an app: it sends it back as it came,
writes it into each line of the log, and fails over one that is not UTF-8. What is here runs in the proxy,
in front of that, where the environment has `PROXY_CALLBACK` (`ray-synth serve run`, our image).
"""

from __future__ import annotations

import re
from typing import Any

ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")
# Headers by which Serve's proxy lets a caller steer it: time limits, work for those who went away, routes
# between replicas. Our clients send none of them.
STEERING = (
    b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id",
    b"serve-multiplexed-model-id", b"serve_multiplexed_model_id",
)  # fmt: skip
PROXY_CALLBACK = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ray_synth.service.request_ids.middlewares"
}


def is_id(text: str) -> bool:
    """Whether a request id may be sent back and logged."""
    return bool(ID.fullmatch(text.encode()))


class PlainHeaders:
    """ASGI middleware of the proxy: leaves out ids that are none, and headers that steer it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = {**scope, "headers": plain_headers(scope["headers"])}
        await self.app(scope, receive, send)


def plain_headers(headers: Any) -> list[tuple[bytes, bytes]]:
    """The headers without ids that are none, and but one id; without those that steer the proxy."""
    kept: list[tuple[bytes, bytes]] = []
    known = False
    for name, value in headers:
        lower = name.lower()
        if lower == b"x-request-id":
            if known or not ID.fullmatch(value):
                continue
            known = True
        elif lower in STEERING or lower.startswith(b"x-serve-router-"):
            continue
        kept.append((name, value))
    return kept


def middlewares() -> list[Any]:
    """What Serve's proxy is to put in front of itself."""
    from starlette.middleware import Middleware

    return [Middleware(PlainHeaders)]


__all__ = ["PROXY_CALLBACK", "is_id", "middlewares"]
