"""What comes before a request's body is read: whose it is, whether it may, and whether there is room.

Pure ASGI, in front of FastAPI, in each replica of the ingress. Health, limits and pages pass at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import os
import re
import secrets
from typing import Any

from starlette.responses import Response
from starlette.routing import get_route_path

from ray_synth.errors import UserError
from ray_synth.service.arrivals import Arrivals, Full, TooLarge, TooSlow
from ray_synth.service.limits import Limits
from ray_synth.service.problems import problem_response
from ray_synth.service.turns import CALLER

TOKEN_VARIABLE = "RAY_SYNTH_SERVE_TOKEN"
OPEN = frozenset({"/", "/healthz", "/readyz", "/limits", "/docs", "/openapi.json"})
WITH_BODY = frozenset(
    {"/disambiguate", "/disambiguate/batch", "/prompts", "/v1/images/generations"}
)
DRAIN_S = (
    10.0  # a refused caller that still sends is read and forgotten, so that it sees the answer
)
QUIET_S = 1.0


def service_token() -> str | None:
    """The token that callers must bring; None where the environment has no such variable.

    Raises:
        UserError: the variable is there and holds none: a service that seems guarded would be open.
    """
    given = os.environ.get(TOKEN_VARIABLE)
    if given is None:
        return None
    token = given.strip()  # of a file's trailing newline
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            f"{TOKEN_VARIABLE} is {'not one word of ASCII' if token else 'empty'}: give it a token "
            "(openssl rand -hex 32), or unset it for a service without one"
        )
    return token


def is_admitted(authorization: str) -> bool:
    """Whether an `Authorization` header brings the token, where there is one."""
    token = service_token()
    if token is None:
        return True
    scheme, _, given = authorization.strip().partition(" ")
    right = secrets.compare_digest(given.strip().encode(), token.encode())
    return right and scheme.lower() == "bearer"


def is_rebound(host: str, server: Any, hostnames: list[str]) -> bool:
    """Whether a request to the loopback address comes under a name that is not this machine's.

    A page of the web whose name leads to 127.0.0.1 could ask the service from a visitor's browser.
    """
    if not server or not _is_loopback(str(server[0])):
        return False
    name = re.sub(r":\d*$", "", host.strip().lower()).strip("[]").rstrip(".")
    named = {other.strip().lower().rstrip(".") for other in hostnames}
    return not (_is_loopback(name) or name in named)


def _is_loopback(name: str) -> bool:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


class Gate:
    """ASGI middleware. Its state is the class's: Serve copies the app before the config is known."""

    limits = Limits()
    arrivals: Arrivals | None = None  # made in the event loop that uses it
    working = 0
    _numbers = itertools.count()

    def __init__(self, app: Any) -> None:
        self.app = app

    @classmethod
    def open_with(cls, limits: Limits) -> None:
        """Take these limits from now on. Raises UserError for a token that is none."""
        service_token()
        cls.limits, cls.arrivals, cls.working = limits, None, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = get_route_path(scope)
        refusal = self._refusal(scope, path)
        if refusal is not None:
            return await _answer_and_drain(refusal, scope, receive, send)
        if scope["method"] != "POST" or path not in WITH_BODY:
            return await self.app(scope, _replay([_NO_BODY], receive), send)
        if Gate.arrivals is None:
            Gate.arrivals = Arrivals(self.limits.max_bytes_in_flight, self.limits.body_timeout_s)
        try:
            arrival, messages = await Gate.arrivals.read(receive, self.limits.max_body_bytes)
        except (TooLarge, TooSlow, Full) as error:
            return await _answer_and_drain(self._told(error), scope, receive, send)
        Gate.working += 1
        client = scope.get("client")
        turn = CALLER.set((str(client[0]) if client else "", next(self._numbers)))
        try:
            await self.app(scope, _replay(messages, receive), send)
        finally:
            CALLER.reset(turn)
            Gate.working -= 1
            Gate.arrivals.leave(arrival)

    def _refusal(self, scope: Any, path: str) -> Response | None:
        """What can be said before the body."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if is_rebound(headers.get(b"host", ""), scope.get("server"), self.limits.hostnames):
            return problem_response(
                421, "this service is reached as localhost, or by a name in limits.hostnames"
            )
        if path not in OPEN and not is_admitted(headers.get(b"authorization", "")):
            return problem_response(
                401,
                "send the header 'Authorization: Bearer TOKEN'",
                {"WWW-Authenticate": "Bearer"},
            )
        if path not in WITH_BODY:
            return None
        announced = headers.get(b"content-length", "")
        if announced.isdigit() and int(announced[:20]) > self.limits.max_body_bytes:
            return self._told(TooLarge())
        return self._told(Full()) if Gate.working >= self.limits.max_queued_requests else None

    def _told(self, error: Exception) -> Response:
        limits = self.limits
        if isinstance(error, TooLarge):
            most = f"{limits.max_body_bytes:,}"
            text = f"the body is over the limit of {most} bytes: send fewer or smaller images"
            return problem_response(413, text)
        if isinstance(error, TooSlow):
            text = (
                f"nothing of the body came for {limits.body_timeout_s:g} s, or it came too slowly"
            )
            return problem_response(408, text)
        return problem_response(
            503, "the service is busy with as much as it takes: ask again", {"Retry-After": "1"}
        )


_NO_BODY = {"type": "http.request", "body": b"", "more_body": False}


def _replay(messages: list[Any], receive: Any) -> Any:
    """`receive` of what was read before, and then of what comes."""
    waiting = list(reversed(messages))
    messages.clear()

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return again


async def _answer_and_drain(response: Response, scope: Any, receive: Any, send: Any) -> None:
    """Answer at once; then read on, within reason, what a caller is still sending.

    Its connection would be closed under it, and it would see that instead of the answer.
    """
    await send(
        {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
    )
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    try:
        async with asyncio.timeout(DRAIN_S):
            while True:
                message = await asyncio.wait_for(receive(), QUIET_S)
                if message["type"] != "http.request" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


__all__ = ["TOKEN_VARIABLE", "Gate", "service_token"]
