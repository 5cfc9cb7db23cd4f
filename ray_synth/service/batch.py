"""A whole class list at once: the classes of one data set inform each other."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import numpy as np
from fastapi import HTTPException

from ray_synth.meaning.ambiguity import ANSWERS_A_MEANING
from ray_synth.meaning.background import Background
from ray_synth.meaning.candidates import siblings_context
from ray_synth.service.limits import read_images
from ray_synth.service.messages import Answer, BatchBody, ClassQuestion, Line
from ray_synth.service.problems import problem
from ray_synth.service.resolver import Resolver, ServeConfig

CLASSES_AT_ONCE = 32  # enough to fill CLIP's batches
BATCHES_AT_ONCE = 2  # of the language model, for each of its replicas
PAUSE_S = 15.0


def classes_at_once(config: ServeConfig, num_meanings: int) -> int:
    """As many as keep the models busy: with more, each waits longer and its time limit comes nearer."""
    if num_meanings == 0:
        return CLASSES_AT_ONCE
    replicas = config.llm.replicas
    most = replicas if isinstance(replicas, int) else max(replicas)
    questions = BATCHES_AT_ONCE * config.llm.max_batch_size * most
    return min(CLASSES_AT_ONCE, max(2, questions // (ANSWERS_A_MEANING * num_meanings)))


class Seen:
    """The features of a list's images: of each class, and the sums of all as a background."""

    def __init__(self) -> None:
        self.rows: dict[str, np.ndarray | None] = {}
        self._all: Background | None = None

    def add(self, name: str, rows: np.ndarray | None) -> None:
        """(num_images, dim) unit rows of a class; None where it has no images."""
        self.rows[name] = rows
        if rows is not None:
            own = Background.of(rows)
            self._all = own if self._all is None else self._all + own

    def others(self, name: str) -> Background | None:
        """All other classes' images."""
        own = self.rows[name]
        return self._all.without(own) if self._all and own is not None else self._all


async def answer_lines(body: BatchBody, resolver: Resolver) -> AsyncIterator[str]:
    """One line of JSON per class, as it is resolved; an empty one after a pause.

    What speaks for every class's images speaks for none of them; and where a class has neither images
    nor a context, its siblings' names are the context.
    """
    names = [question.class_name for question in body.classes]
    seen = Seen()
    gate = asyncio.Semaphore(classes_at_once(resolver.config, body.num_meanings))

    async def see(question: ClassQuestion) -> Line | bool:
        async def work() -> Any:
            images = await read_images(question.images, resolver.config.limits)
            question.images.clear()  # of 1,000 classes: not needed again
            return await resolver.embed_images(images)

        async with gate:
            found = await _guarded(question, work(), resolver)
        if isinstance(found, Line):
            return found
        seen.add(question.class_name, found)
        return True

    async def ask(question: ClassQuestion) -> Line:
        async with gate:
            own = seen.rows[question.class_name]
            siblings = siblings_context(question.class_name, names) if own is None else None
            work = resolver.resolve(
                question.class_name,
                own,
                num_meanings=body.num_meanings,
                seed=body.seed,
                meanings=question.meanings,
                context=body.context or siblings,
                others=seen.others(question.class_name),
            )
            found = await _guarded(question, work, resolver)
        return found if isinstance(found, Line) else _line(question, answer=Answer(**found))

    with resolver.metrics.timed("batch"):
        for step in (see, ask):
            todo = [q for q in body.classes if step is see or q.class_name in seen.rows]
            async for line in _as_they_finish({asyncio.ensure_future(step(q)) for q in todo}):
                if line is None:
                    yield "\n"
                elif isinstance(line, Line):
                    yield line.model_dump_json(exclude_none=True) + "\n"


async def _guarded(question: ClassQuestion, work: Awaitable[Any], resolver: Resolver) -> Any:
    """The result, or the line that says what was wrong: one class never ends the others."""
    try:
        return await resolver.answered(work)
    except HTTPException as error:
        return _line(question, problem=problem(error.status_code, str(error.detail)))
    except Exception as error:
        resolver.metrics.log_failure(error)
        text = "the service failed on this class; its log says why"
        return _line(question, problem=problem(500, text))


def _line(question: ClassQuestion, **what: Any) -> Line:
    return Line(class_name=question.class_name, **what)


async def _as_they_finish(tasks: set[asyncio.Future[Any]]) -> AsyncIterator[Any]:
    """Results as they come, and None after each pause, so that gateways see a living stream."""
    try:
        while tasks:
            done, tasks = await asyncio.wait(
                tasks, timeout=PAUSE_S, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                yield task.result()
            if not done:
                yield None
    finally:
        for task in tasks:  # a caller who went away is not worked for
            task.cancel()
