"""What trials train on: runs without a training of their own, up to their images.

Sources ask many of the same things. What two have in common is done once; models are loaded once for all
sources, not once for each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ray_synth.config import Config
from ray_synth.generation.chunks import missing_rows
from ray_synth.monitoring.progress import Bar, make_board, watch
from ray_synth.pipeline.commits import fetch_generator
from ray_synth.pipeline.run import Run, open_run
from ray_synth.pipeline.sets import listing
from ray_synth.pipeline.steps import inspected, practises, run_images, run_quality, run_words
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
T = TypeVar("T")


def make_sources(
    configs: Mapping[str, Config], mixed: Collection[str], kept_in: Folder, *, at_a_time: int
) -> dict[str, Run]:
    """Inspect the data of all sources, and resolve, plan and generate what those in `mixed` train on.

    Args:
        configs: of each source, by its name.
        kept_in: where the runs' lists of files are kept.
        at_a_time: sources whose real images are measured side by side.

    Raises:
        UserError: as the pipeline's stages do.
    """
    shared = _Shared()
    runs = {name: _inspected(config, kept_in, shared) for name, config in configs.items()}
    wanted = [run for name, run in runs.items() if name in mixed]
    _write_words([run for run in wanted if run.records.record("plan") is None], shared)
    missing = [run for run in wanted if run.records.record("generation") is None]
    side_by_side(run_quality, missing, at_a_time)
    _make_images([run for run in missing if not practises(run)], at_a_time)
    side_by_side(run_images, missing, at_a_time)
    return runs


class _Shared:
    """Which run did a stage, by the digest of the stage's inputs."""

    def __init__(self) -> None:
        self._done: dict[tuple[str, str], Run] = {}

    def keep(self, run: Run, stage: str) -> None:
        """Remember what a run did."""
        self._done.setdefault((stage, run.records.digest(stage)), run)

    def take(self, run: Run, stage: str, *files: str) -> None:
        """Take a stage's result from a run that did it with the same inputs, if there is one."""
        other = self._done.get((stage, run.records.digest(stage)))
        if other is None or other is run or run.records.record(stage) is not None:
            return
        for name in (*files, f"stages/{stage}.json"):  # the record last: it says that all is there
            if other.folder.exists(name):  # images that ship with the package have no list of files
                run.folder.write_bytes(name, other.folder.read_bytes(name))


def _inspected(config: Config, kept_in: Folder, shared: _Shared) -> Run:
    run = open_run(config, kept_in=kept_in)
    shared.take(run, "data", listing("data.train"))
    run = inspected(run)
    for stage in ("data", "meaning"):
        if run.records.record(stage) is not None:
            shared.keep(run, stage)
    return run


def _write_words(runs: list[Run], shared: _Shared) -> None:
    """Meanings and plans; the models are loaded once for all runs that ask the same ones."""
    from ray_synth.service.session import Service

    groups: dict[str, list[Run]] = {}
    for run in runs:
        meaning = run.config.meaning
        models = meaning.llm.model_dump_json() + meaning.clip.model_dump_json()
        groups.setdefault(models + meaning.lexicon, []).append(run)
    for group in groups.values():
        with Service(group[0].config) as service:
            for number, run in enumerate(group):
                log.info("words of source %d of %d", number + 1, len(group))
                service.config = run.config
                shared.take(run, "meaning", "meanings.json")
                run_words(run, service)
                shared.keep(run, "meaning")


def _make_images(runs: list[Run], at_a_time: int) -> None:
    """What the stores lack, through one pool for all runs of a generator."""
    from ray_synth.generation.cost import cost_note
    from ray_synth.generation.shared_pool import make_together, share_batch_sizes
    from ray_synth.generation.stream import missing_chunks

    if len(runs) < 2:  # alone, it has a pool of its own
        return
    jobs = [run.generation_job() for run in runs if run.config.take_over is None]
    share_batch_sizes(jobs)
    work = [(job, missing_chunks(job)) for job in jobs]
    total = sum(missing_rows(chunks) for _, chunks in work)
    if not total:
        return
    for config in {run.config.generation.model_dump_json(): run.config for run in runs}.values():
        fetch_generator(config)
    board, bars = make_board(), {"made": Bar("generation", total, "images")}
    work = [(replace(job, board=board), chunks) for job, chunks in work]
    with watch(board, bars, notes={"made": partial(cost_note, config=runs[0].config)}):
        make_together(work, at_a_time=at_a_time)


def side_by_side(work: Callable[[T], Any], items: Iterable[T], at_a_time: int) -> None:
    """Do all, so many at a time; the first error is raised, when those under way have ended."""
    with ThreadPoolExecutor(at_a_time) as pool:
        waiting = [pool.submit(work, item) for item in items]
        try:
            for future in waiting:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
