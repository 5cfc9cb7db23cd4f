"""Turns between callers: who asks for much waits for its own, and who asks for little does not.

Callers are addresses, and within an address (a gateway is one for all) its requests.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Generic, NamedTuple, TypeVar

Caller = tuple[str, int]  # address, number of its request
CALLER: ContextVar[Caller] = ContextVar("caller", default=("", 0))
LARGE = 8  # a work that takes more than an eighth of the room is large
T = TypeVar("T")


class _Waiting(NamedTuple, Generic[T]):
    cost: float
    item: T
    answer: asyncio.Future[object]


class _Line(Generic[T]):
    """One request's items, and what was worked for it while it waited."""

    def __init__(self, spent: float) -> None:
        self.spent = spent
        self.items: deque[_Waiting[T]] = deque()


class _Address(Generic[T]):
    """The requests of one address, and what was worked for them while any of them waited."""

    def __init__(self, spent: float) -> None:
        self.spent = spent
        self.lines: dict[int, _Line[T]] = {}


class Turns(Generic[T]):
    """A queue: next is an item of the caller for whom the least was worked while it waited.

    Items whose answer is done, such as those of callers who went away, are passed over.
    """

    def __init__(self) -> None:
        self._addresses: dict[str, _Address[T]] = {}

    def put(self, caller: Caller, item: T, answer: asyncio.Future[object], cost: float = 1) -> None:
        """Append to the caller's line; who comes anew is level with the one served least."""
        name, number = caller
        if name not in self._addresses:
            least = min((one.spent for one in self._addresses.values()), default=0.0)
            self._addresses[name] = _Address(least)
        lines = self._addresses[name].lines
        if number not in lines:
            lines[number] = _Line(min((line.spent for line in lines.values()), default=0.0))
        lines[number].items.append(_Waiting(cost, item, answer))

    def pop(self, fits: Callable[[float, T], bool] = lambda cost, item: True) -> _Waiting[T] | None:
        """The next item that fits, of each request the oldest first; None where there is none."""
        self._forget_the_gone()
        for _, address in sorted(self._addresses.items(), key=lambda pair: pair[1].spent):
            for _, line in sorted(address.lines.items(), key=lambda pair: (pair[1].spent, pair[0])):
                for at, found in enumerate(line.items):
                    if fits(found.cost, found.item) and not found.answer.done():
                        del line.items[at]
                        line.spent += found.cost
                        address.spent += found.cost
                        return found
        return None

    def _forget_the_gone(self) -> None:
        for name, address in list(self._addresses.items()):
            for number, line in list(address.lines.items()):
                while line.items and line.items[0].answer.done():
                    line.items.popleft()
                if not line.items:
                    del address.lines[number]
            if not address.lines:
                del self._addresses[name]


class Room:
    """Lets works in, in turns between callers, while what is inside fits.

    Large works have half of the places at most: small ones do not wait until they are through.

    Args:
        most: of the works' costs together, such as bytes. A larger work goes in alone.
        at_once: works.
    """

    def __init__(self, most: float, at_once: int) -> None:
        self.most, self.at_once = most, at_once
        self.inside, self.count, self.large = 0.0, 0, 0
        self._waiting: Turns[None] = Turns()
        self._next: _Waiting[None] | None = None  # has its turn, and waits for room

    @asynccontextmanager
    async def entered(self, caller: Caller, cost: float) -> AsyncIterator[None]:
        """Wait for a turn, and for room."""
        turn: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._waiting.put(caller, None, turn, cost)
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._let_in()  # it may have kept others waiting
            else:  # let in, and gone the same moment
                self._leave(cost)
            raise
        try:
            yield
        finally:
            self._leave(cost)

    def _is_large(self, cost: float) -> bool:
        return cost > self.most / LARGE

    def _enter(self, cost: float, sign: int = 1) -> None:
        self.inside += sign * cost
        self.count += sign
        self.large += sign * self._is_large(cost)

    def _leave(self, cost: float) -> None:
        self._enter(cost, -1)
        self._let_in()

    def _may_turn(self, cost: float, _: None) -> bool:
        return not self._is_large(cost) or self.large < max(1, self.at_once // 2)

    def _let_in(self) -> None:
        while self.count < self.at_once:
            found = self._next or self._waiting.pop(self._may_turn)
            self._next = None
            if found is None:
                return
            if found.answer.done():  # its caller went away
                continue
            # Whose turn it is, or nobody: small works that go past would keep a large one out.
            if self.count and self.inside + found.cost > self.most:
                self._next = found
                return
            self._enter(found.cost)
            found.answer.set_result(None)


__all__ = ["CALLER", "Caller", "Room", "Turns"]
