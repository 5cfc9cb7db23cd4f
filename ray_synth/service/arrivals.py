"""Bodies on their way: a deadline for each, and a budget of bytes for all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

SLOWEST = 64_000  # bytes a second; who keeps up with it has all the time it takes
GRACE_S = 1.0  # who stood still so long makes room where there is none left
MOST_ARRIVALS = 2048


class TooSlow(Exception):
    """A body that did not come in its time, or made room for others while it stood still."""


class TooLarge(Exception):
    """A body over the limit."""


class Full(Exception):
    """No room for a body, and none that stands still."""


class Arrival:
    """One body: its bytes count until `Arrivals.leave`."""

    def __init__(self, due: float) -> None:
        self.size, self.due = 0, due
        self.timer: asyncio.Timeout | None = None


class Arrivals:
    """The bodies of one process, from their first byte until they are answered.

    Args:
        most_bytes: of all bodies together.
        patience_s: how long a body may stand still. Each byte that comes pays for 1 / `SLOWEST` s.
    """

    def __init__(self, most_bytes: int, patience_s: float) -> None:
        self.most_bytes, self.patience_s = most_bytes, patience_s
        self.held = 0
        self._coming: set[Arrival] = set()

    async def read(
        self, receive: Callable[[], Awaitable[Any]], limit: int
    ) -> tuple[Arrival, list[Any]]:
        """The ASGI messages of a body, the last one a disconnect where the caller went away.

        `leave` must be called for the arrival, however its request ends.

        Raises:
            TooLarge, TooSlow, Full: nothing of it is held any more.
        """
        loop = asyncio.get_running_loop()
        if len(self._coming) >= MOST_ARRIVALS:
            self._make_room(loop.time(), grace_s=0)
        arrival = Arrival(loop.time() + self.patience_s)
        self._coming.add(arrival)
        messages: list[Any] = []
        more = True
        try:
            while more:
                async with asyncio.timeout_at(arrival.due) as arrival.timer:
                    message = await receive()
                messages.append(message)
                length = len(message.get("body", b""))
                self._take(arrival, length, limit, loop.time())
                more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            self.leave(arrival)
            raise TooSlow from None
        except BaseException:
            self.leave(arrival)
            raise
        self._coming.discard(arrival)
        return arrival, messages

    def _take(self, arrival: Arrival, length: int, limit: int, now: float) -> None:
        if arrival.size + length > limit:
            raise TooLarge
        while self.held + length > max(self.most_bytes, limit):
            if not self._make_room(now, but=arrival):
                raise Full
        arrival.size += length
        self.held += length
        arrival.due = min(arrival.due + length / SLOWEST, now + self.patience_s)

    def _make_room(self, now: float, but: Arrival | None = None, grace_s: float = GRACE_S) -> bool:
        """Turn away the body that is furthest behind; False where all keep up."""
        behind = [one for one in self._coming if one is not but]
        last = min(behind, key=lambda one: one.due, default=None)
        if last is None or last.due > now + self.patience_s - min(grace_s, self.patience_s / 2):
            return False
        self.leave(last)
        if last.timer is not None:
            last.timer.reschedule(now)
        return True

    def leave(self, arrival: Arrival) -> None:
        """Its bytes are let go of; again is nothing."""
        self._coming.discard(arrival)
        self.held -= arrival.size
        arrival.size = 0


__all__ = ["Arrivals", "Full", "TooLarge", "TooSlow"]
