"""A whole class list at once: the classes of one data set inform each other."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import numpy as np
from fastapi import HTTPException

from ray_synth.meaning.background import Background
from ray_synth.meaning.candidates import siblings_context
from ray_synth.service.limits import read_images
from ray_synth.service.messages import Answer, BatchBody, ClassQuestion, Line
from ray_synth.service.problems import problem
from ray_synth.service.resolver import Resolver

CLASSES_AT_ONCE = 32  # enough to fill the models' batches
PAUSE_S = 15.0


async def answer_lines(body: BatchBody, resolver: Resolver) -> AsyncIterator[str]:
    """One line of JSON per class, as it is resolved; an empty one after a pause.

    What speaks for every class's images speaks for none of them; and where a class has neither images
    nor a context, its siblings' names are the context.
    """
    names = [question.class_name for question in body.classes]
    features: dict[str, np.ndarray | None] = {}
    whole: list[Background] = []  # one, of all images, once there are any
    gate = asyncio.Semaphore(CLASSES_AT_ONCE)

    async def see(question: ClassQuestion) -> Line | bool:
        async def work() -> Any:
            images = await read_images(question.images, resolver.config.limits)
            return await resolver.embed_images(images)

        async with gate:
            found = await _guarded(question, work(), resolver)
        if isinstance(found, Line):
            return found
        features[question.class_name] = found
        if found is not None:
            whole[:] = [sum(whole, Background.of(found))]
        return True

    async def ask(question: ClassQuestion) -> Line:
        own = features[question.class_name]
        others = whole[0] if whole else None
        siblings = siblings_context(question.class_name, names) if own is None else None
        work = resolver.resolve(
            question.class_name,
            own,
            num_meanings=body.num_meanings,
            seed=body.seed,
            meanings=question.meanings,
            context=body.context or siblings,
            others=others.without(own) if others and own is not None else others,
        )
        async with gate:
            found = await _guarded(question, work, resolver)
        return found if isinstance(found, Line) else _line(question, answer=Answer(**found))

    with resolver.metrics.timed("batch"):
        for step in (see, ask):
            todo = [q for q in body.classes if step is see or q.class_name in features]
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
