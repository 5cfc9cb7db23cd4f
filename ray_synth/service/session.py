"""The pipeline's side of the disambiguation app: starts it for a while, and asks it about classes.

Each driver has an app of its own, by the number that Ray gives it: two runs on one cluster never meet.
Serve itself is stopped by whoever takes the last app down, and only where a pipeline started it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tenacity

from ray_synth.config import ClassInfo, Config
from ray_synth.meaning.background import Background
from ray_synth.meaning.told import as_told
from ray_synth.service.apps import app_name, remove_left_behind, start_serve, take_down

log = logging.getLogger("ray_synth")
IN_FLIGHT = 64  # classes asked about at once: enough to fill the batches


class Service:
    """A context in which classes can be asked about; the app starts at the first question."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._handle: Any = None
        self._begun = False
        self._name = ""

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the app down, also one whose start was interrupted: its replicas' CPUs and GPUs are
        needed by the next stages, and Serve would outlive this driver."""
        if not self._begun:
            return
        take_down(self._name)
        self._handle, self._begun = None, False

    def start(self) -> None:
        """Start the app now, where it was not asked anything yet."""
        self._app()

    def _app(self) -> Any:
        if self._handle is None:
            from ray_synth.service.app import ServeConfig

            remove_left_behind()
            self._name = app_name(self.config.name)
            self._begun = True
            meaning = self.config.meaning
            config = ServeConfig(llm=meaning.llm, clip=meaning.clip, lexicon=meaning.lexicon)
            self._handle = start_serve(config, self._name)
        return self._handle

    def resolve_all(
        self,
        images: Iterable[tuple[str, list[bytes]]],
        *,
        seed: int,
        known: Container[str] = frozenset(),
        told: Mapping[str, ClassInfo] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """meanings.json entries of classes, given with their images, as they are resolved.

        All images are embedded first: each class is judged against the others'.

        Args:
            known: names of classes that were resolved before, and only inform the others.
            told: what the user knows of classes, by name.
        """
        meaning = self.config.meaning
        features: dict[str, np.ndarray] = {}
        whole: Background | None = None
        for (name, _), rows in ask_all(images, lambda i: self._app().embed_images.remote(i[1])):
            features[name] = rows
            own = Background.of(rows)
            whole = own if whole is None else whole + own

        def ask(item: tuple[str, np.ndarray]) -> Any:
            return self._app().resolve.remote(
                item[0],
                item[1],
                whole.without(item[1]) if whole else None,
                num_meanings=meaning.num_meanings,
                retries=meaning.retries,
                seed=seed,
                **as_told((told or {}).get(item[0]), meaning.context),
            )

        todo = ((name, rows) for name, rows in features.items() if name not in known)
        for _, entry in ask_all(todo, ask):
            yield entry

    def write_contexts_all(
        self, meanings: dict[str, str], *, seed: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(class name, its contexts) as they are written."""

        def ask(item: tuple[str, str]) -> Any:
            return self._app().contexts.remote(
                item[0],
                item[1],
                num_contexts=self.config.prompting.contexts_per_class,
                retries=1,
                seed=seed,
            )

        for (class_name, _), entry in ask_all(meanings.items(), ask):
            yield class_name, entry


def ask_all(items: Iterable[Any], ask: Any) -> Iterator[tuple[Any, Any]]:
    """Keep some questions in flight; give answers in the order of the items.

    Args:
        ask: the response of an item's question. A question that a replica died over is asked again.
    """
    waiting: deque[tuple[Any, Any]] = deque()
    for item in items:
        waiting.append((item, ask(item)))
        if len(waiting) >= IN_FLIGHT:
            first, response = waiting.popleft()
            yield first, _answer(first, response, ask)
    while waiting:
        first, response = waiting.popleft()
        yield first, _answer(first, response, ask)


def _answer(item: Any, response: Any, ask: Any) -> Any:
    from ray.exceptions import RayActorError

    for attempt in tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(RayActorError),
        stop=tenacity.stop_after_attempt(6),
        wait=tenacity.wait_exponential(0.5, max=20),
        reraise=True,
    ):
        with attempt:
            if attempt.retry_state.attempt_number > 1:
                log.warning("a replica of the service is gone; asking again")
                response = ask(item)
            return _waited_for(response)


def _waited_for(response: Any) -> Any:
    """A response's result. Serve waits in no thread in which an event loop runs, as a notebook's does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return response.result()
    with ThreadPoolExecutor(1, thread_name_prefix="answers") as pool:
        return pool.submit(response.result).result()
