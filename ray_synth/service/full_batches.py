"""Batches that go on filling while the model is busy.

Ray Serve's own (`serve.batch`, 2.60) are cut when their time is up, however long they then wait for the
model: under load with questions that come by threes, batches of 16 held 6 on average.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ray_synth.service.turns import Caller, Turns


class FullBatches:
    """Single requests in, lists of requests to the model, one list at a time.

    Callers take turns, counted in sizes: one with hundreds of requests keeps no other waiting for all of
    them. A request whose caller went away is not worked for.

    Args:
        work: answers a list of requests, in order; what it raises, each of them raises.
        max_size: of a batch. A larger request is a batch by itself.
        wait_s: how long an idle model waits for company for the first request.
        size: of a request.
        kind: requests share a batch only with their like; the kind of whose turn it is goes first.
    """

    def __init__(
        self,
        work: Callable[[list[Any]], Awaitable[list[Any]]],
        *,
        max_size: int,
        wait_s: float = 0.01,
        size: Callable[[Any], int] = lambda request: 1,
        kind: Callable[[Any], Any] = lambda request: None,
    ) -> None:
        self.work, self.max_size, self.wait_s = work, max_size, wait_s
        self.size, self.kind = size, kind
        self.batches = self.items = 0
        self._waiting: Turns[Any] = Turns()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, request: Any, caller: Caller = ("", 0)) -> Any:
        """The answer to one request."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.put(caller, request, answer, self.size(request))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        await asyncio.sleep(self.wait_s)
        while batch := self._next():
            try:
                results = await self.work([request for request, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), result in zip(batch, results, strict=True):
                if not answer.done():
                    answer.set_result(result)
            await asyncio.sleep(
                0
            )  # who was answered may ask the next question before the next batch

    def _next(self) -> list[tuple[Any, asyncio.Future[Any]]]:
        """The request whose turn it is, and the next of its kind that fit beside it."""
        first = self._waiting.pop()
        if first is None:
            return []
        kind = self.kind(first.item)
        batch, total = [(first.item, first.answer)], first.cost

        def fits(cost: float, request: Any) -> bool:
            return total + cost <= self.max_size and self.kind(request) == kind

        while total < self.max_size and (found := self._waiting.pop(fits)):
            batch.append((found.item, found.answer))
            total += found.cost
        self.batches += 1
        self.items += int(total)
        return batch


__all__ = ["FullBatches"]
