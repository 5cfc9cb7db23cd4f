"""What is said before a body is read, and what bodies may hold: the gate alone, without Ray."""

import asyncio
import contextlib
import json

import pytest

from ray_synth.errors import UserError
from ray_synth.service.gate import TOKEN_VARIABLE, Gate, is_rebound, service_token
from ray_synth.service.limits import Limits
from ray_synth.service.request_ids import plain_headers


@pytest.fixture(autouse=True)
def _closed_again():
    yield
    Gate.open_with(Limits())


class Caller:
    """One request to an app behind the gate; its body comes as the test says."""

    def __init__(self, app, path="/disambiguate", method="POST", host="x", **headers):
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "root_path": "",
            "headers": [(b"host", host.encode())]
            + [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
            "client": ("10.0.0.1", 1),
            "server": ("10.0.0.2", 8000),
        }
        self.coming: asyncio.Queue = asyncio.Queue()
        self.asked = 0
        self.sent: list[dict] = []
        self.answered = asyncio.Event()
        self.task = asyncio.create_task(Gate(app)(self.scope, self._receive, self._send))

    async def _receive(self):
        self.asked += 1
        return await self.coming.get()

    async def _send(self, message):
        self.sent.append(message)
        self.answered.set()

    def send(self, body: bytes, more: bool = True) -> None:
        self.coming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    async def status(self) -> int:
        await asyncio.wait_for(self.answered.wait(), 5)
        return self.sent[0]["status"]


async def echo(scope, receive, send):
    """An app that says how long the body was, and keeps at work while `HOLD` says so."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await HOLD["until"].wait()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode(), "more_body": False})


HOLD: dict[str, asyncio.Event] = {}


def run(scenario, **limits):
    """Run a scenario behind a gate with these limits, and end what is left of its requests."""

    async def all_of_it():
        HOLD["until"] = asyncio.Event()
        HOLD["until"].set()
        Gate.open_with(Limits(**limits))
        callers = []

        def call(*args, **more):
            callers.append(Caller(echo, *args, **more))
            return callers[-1]

        try:
            await scenario(call)
        finally:
            for caller in callers:
                caller.task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await caller.task
        assert Gate.working == 0
        assert Gate.arrivals is None or Gate.arrivals.held == 0

    asyncio.run(all_of_it())


def test_the_token_comes_before_the_body(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "secret\n")

    async def scenario(call):
        for header in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic secret"}):
            caller = call(content_length="30000000", **header)
            assert await caller.status() == 401
            assert caller.sent[1]["more_body"], "said before anything was read"
            assert json.loads(caller.sent[1]["body"])["status"] == 401
        assert await call("/no-such-path").status() == 401
        for scheme in ("Bearer", "bearer", "BEARER"):
            caller = call(authorization=f"{scheme} secret")
            caller.send(b"x", more=False)
            assert await caller.status() == 200
        for path in ("/healthz", "/readyz", "/limits", "/", "/docs"):
            assert await call(path, method="GET").status() == 200

    run(scenario)


@pytest.mark.parametrize("token", ["", "\n", "two words", "n\u00f6"])
def test_a_token_that_is_none_is_refused_at_the_start(monkeypatch, token):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        Gate.open_with(Limits())
    monkeypatch.setenv(TOKEN_VARIABLE, " good \r\n")
    assert service_token() == "good"
    monkeypatch.delenv(TOKEN_VARIABLE)
    assert service_token() is None


def test_a_body_that_stands_still_is_given_up(monkeypatch):
    async def scenario(call):
        still, steady = call(), call()
        still.send(b"12345")
        for _ in range(10):
            steady.send(b"x" * 20_000)
            await asyncio.sleep(0.06)
        assert await still.status() == 408
        steady.send(b"", more=False)
        assert await steady.status() == 200
        assert steady.sent[1]["body"] == b"200000"

    run(scenario, body_timeout_s=0.3)


def test_held_bodies_make_room_for_those_that_come(monkeypatch):
    async def scenario(call):
        held = [call() for _ in range(40)]
        for caller in held:
            caller.send(b"x" * 900)
            await asyncio.sleep(0)
        await asyncio.sleep(0.6)
        assert Gate.arrivals.held <= 4000
        honest = [call() for _ in range(4)]
        for caller in honest:
            caller.send(b"y" * 1000, more=False)
        assert [await caller.status() for caller in honest] == [200] * 4
        assert Gate.arrivals.held <= 4000
        turned_away = [await c.status() for c in held if c.answered.is_set()]
        assert set(turned_away) <= {408, 503} and len(turned_away) >= 36

    run(scenario, max_body_bytes=1000, max_bytes_in_flight=4000, body_timeout_s=1)


def test_bodies_in_work_count_until_they_are_answered():
    async def scenario(call):
        HOLD["until"].clear()
        first = [call() for _ in range(4)]
        for caller in first:
            caller.send(b"x" * 1000, more=False)
        await asyncio.sleep(0.01)
        late = call()
        late.send(b"x" * 1000, more=False)
        assert await late.status() == 503
        assert (b"retry-after", b"1") in late.sent[0]["headers"]
        HOLD["until"].set()
        assert [await caller.status() for caller in first] == [200] * 4
        again = call()
        again.send(b"x" * 1000, more=False)
        assert await again.status() == 200

    run(scenario, max_body_bytes=1000, max_bytes_in_flight=4000)


def test_health_never_waits_and_too_many_questions_are_turned_away():
    async def scenario(call):
        stuck = [call() for _ in range(3000)]
        for caller in stuck[:100]:
            caller.send(b"12345")
        HOLD["until"].clear()
        working = [call() for _ in range(2)]
        for caller in working:
            caller.send(b"{}", more=False)
        await asyncio.sleep(0.01)
        assert await call().status() == 503
        HOLD["until"].set()
        assert await call("/healthz", method="GET").status() == 200
        assert [await caller.status() for caller in working] == [200] * 2

    run(scenario, max_queued_requests=2)


def test_a_body_over_the_limit_is_refused_by_its_length_or_as_it_comes():
    async def scenario(call):
        announced = call(content_length="1001")
        assert await announced.status() == 413
        growing = call()
        growing.send(b"x" * 900)
        growing.send(b"x" * 900)
        assert await growing.status() == 413

    run(scenario, max_body_bytes=1000)


@pytest.mark.parametrize(
    ("host", "server", "rebound"),
    [
        ("localhost:8000", "127.0.0.1", False),
        ("127.0.0.1:8000", "127.0.0.1", False),
        ("[::1]:8000", "::1", False),
        ("LOCALHOST.", "127.0.0.1", False),
        ("a.localhost", "127.0.0.1", False),
        ("gate.example", "127.0.0.1", False),
        ("evil.example:8000", "127.0.0.1", True),
        ("127.0.0.1.evil.example", "127.0.0.1", True),
        ("localhost.evil.example", "::1", True),
        ("", "127.0.0.1", True),
        ("evil.example", "10.1.2.3", False),
    ],
)
def test_on_loopback_a_foreign_name_is_refused(host, server, rebound):
    assert is_rebound(host, (server, 8000), ["gate.example"]) is rebound


def test_ids_that_are_none_do_not_reach_the_proxy():
    def left(*values):
        given = [(b"accept", b"*/*"), *((b"x-request-id", value) for value in values)]
        return [value for name, value in plain_headers(given) if name == b"x-request-id"]

    assert left(b"from-a-gateway") == [b"from-a-gateway"]
    assert left(b"4bf92f35-77b3:1/a.b=") == [b"4bf92f35-77b3:1/a.b="]
    for bad in (b"", b"a" * 129, b"\xff\xfe", b"a\nb", b"a b", b"<script>", "\u00e9".encode()):
        assert left(bad) == []
    assert left(b"first", b"second") == [b"first"]
    steering = [(b"X-Request-Timeout-Seconds", b"99999"), (b"x-request-disconnect-disabled", b"1")]
    assert plain_headers([*steering, (b"host", b"x")]) == [(b"host", b"x")]
