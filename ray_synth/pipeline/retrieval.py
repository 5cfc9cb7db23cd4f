"""The verb `retrieve`: the images of a pool that are nearest to each class, as a set for `import`.

In: a config, of which test sets are taken away first, and a pool of other images. Out: a folder with a
tar of each class. A search that was stopped goes on behind the units that it has seen.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ray_synth.cluster.connection import connect, runs_folder
from ray_synth.config import Config, QualityConfig
from ray_synth.data.dataset import ImagesByClass, Index, select, tasks
from ray_synth.data.images import decode_image
from ray_synth.data.pool import load_pool, pool_digest, refuse_tests
from ray_synth.errors import UserError, shortened
from ray_synth.generation.retrieval import Finder, Nearest, Writer, tar_name
from ray_synth.generation.thresholds import REAL_PER_CLASS, REFERENCE_FILE, measure_run
from ray_synth.generators.protocol import digest_settings
from ray_synth.generators.tuning_card import images_digest
from ray_synth.meaning.entries import MEANINGS, read_meanings
from ray_synth.monitoring.driver_lock import sole_driver
from ray_synth.monitoring.progress import Bar
from ray_synth.pipeline.tuning import pinned, training_images, without_tests
from ray_synth.preflight import check_budget, cluster_reach
from ray_synth.preflight.refusals import check_clip
from ray_synth.storage.folder import Folder
from ray_synth.storage.hub import MODELS

log = logging.getLogger("ray_synth")
RETRIEVED = "retrieved"  # the folder in a run's
RECORD = "retrieval.json"  # in it, last: it says that all is there
FOUND = "candidates.parquet"
BEGUN = "begun.json"
# Candidates of each class for every image that is wanted: some are copies, or go to another class.
SPARE = 3
SAVE_S = 60.0  # what a kill costs at most of the search
NAMED = 20  # unreadable images that the record names


@dataclass(frozen=True)
class RetrievalJob:
    """What a retrieval is of.

    Attributes:
        config: without test sets.
        place: of the pool, as the user named it.
        real: the training images.
        meanings: of each class, in the order of their names.
        per_class: images wanted of each.
        folder: where they are left.
    """

    config: Config
    place: str
    pool: Index
    real: Index
    meanings: tuple[str, ...]
    per_class: int
    folder: Folder

    @cached_property
    def identity(self) -> str:
        """Digest of all that decides the result."""
        clip = self.config.meaning.clip
        how = [clip.model, clip.pretrained, clip.dtype, self.per_class, self.config.seed]
        of = [pool_digest(self.pool), images_digest(self.real), list(self.meanings)]
        return digest_settings(["retrieval", self.place, *how, *of])

    @property
    def most(self) -> int:
        return SPARE * self.per_class


def retrieve_images(
    config: Config, place: str, *, to: str | None = None, per_class: int | None = None
) -> dict[str, Any]:
    """The images of a pool nearest to each class; what `retrieval.json` says, and `folder`.

    Args:
        place: a folder of pictures at any depth, or of WebDataset tars.
        to: the folder; default: `retrieved/` in the run's.
        per_class: default: as many as the config's plan would have.

    Raises:
        UserError: the pool holds a test set or no image, the folder holds another retrieval, or it does
            not fit the cluster.
    """
    refuse_tests(place, config.data)
    check_clip(config.meaning.clip)
    run_folder = runs_folder(config.runs_dir).child(config.name)
    folder = Folder(to) if to else run_folder.child(RETRIEVED)
    folder.check_writable()
    with sole_driver(folder):
        config, commits = pinned(without_tests(config), folder, "meaning.clip.")
        real = training_images(config)
        meanings = _meanings(run_folder, real.class_names)
        classes = len(real.class_names)
        wanted = per_class or math.ceil(config.prompting.multiplier * len(real) / classes)
        job = RetrievalJob(config, place, load_pool(place), real, meanings, wanted, folder)
        if not _is_done(job):
            folder.write_json(MODELS, commits)
            with connect(config.cluster):
                run_retrieval(job)
        return {**folder.read_json(RECORD), "folder": folder.address()}


def run_retrieval(job: RetrievalJob) -> None:
    """Do a retrieval that is not done, on the connected cluster.

    Raises:
        UserError: it does not fit the cluster, or no image of the pool can be used.
    """
    import ray

    if _is_done(job):
        return
    config, folder = job.config, job.folder
    check_budget(config, cluster_reach(config), stages=("quality",))
    folder.write_json(BEGUN, {"identity": job.identity})
    reference = folder.child("reference")
    clip = config.meaning.clip
    if not reference.exists(REFERENCE_FILE):
        few = _Readable(select(job.real, REAL_PER_CLASS, config.seed), config.data.max_pixels)
        entries = [
            {"class_name": name, "choice": meaning}
            for name, meaning in zip(job.real.class_names, job.meanings, strict=True)
        ]
        own = {"num_cpus": clip.num_cpus, "num_gpus": clip.num_gpus}
        measure: Any = ray.remote(measure_run).options(**own)
        ray.get(measure.remote(few, entries, clip, QualityConfig(), job.per_class, reference))
    search = _Search(job)
    search.run(reference)
    if not len(search.nearest.settled()[0]):
        raise UserError(
            f"not one of the {len(job.pool):,} images of {job.place} can be used (such as "
            f"{shortened(search.named, 3)})"
        )
    written, copies = _write(job, search.nearest, reference)
    _record(job, search, written, copies)


class _Readable(ImagesByClass):
    """The images of a class that can be decoded, when they are asked for."""

    def __init__(self, index: Index, max_pixels: int) -> None:
        super().__init__(index)
        self.max_pixels = max_pixels

    def __getitem__(self, label: int) -> list[bytes]:
        return [data for data in super().__getitem__(label) if self._is_image(data)]

    def _is_image(self, data: bytes) -> bool:
        try:
            decode_image(data, max_pixels=self.max_pixels)
        except UserError:
            return False
        return True


class _Search:
    """The search through a pool, kept as it goes on."""

    def __init__(self, job: RetrievalJob) -> None:
        self.job = job
        self.nearest = Nearest(len(job.meanings), job.most)
        self.done: set[int] = set()
        self.read = self.bad = 0
        self.named: list[str] = []
        if job.folder.exists(FOUND):
            self._load()

    def run(self, reference: Folder) -> None:
        """Look at the units that were not looked at yet."""
        import ray.data

        units = list(self._units())
        total = len(self.job.pool)
        if not units:
            return
        config = self.job.config
        stream: Any = ray.data.from_items(
            units, override_num_blocks=min(len(units), 10_000)
        ).map_batches(
            Finder,
            fn_constructor_args=(
                config.meaning.clip, reference, self.job.most, config.data.max_pixels,
            ),
            batch_size=1,
            **_pool(config),
        )  # fmt: skip
        saved = time.monotonic()
        with Bar("retrieval", total, "images", done=self.read + self.bad) as bar:
            for found in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in found.to_pylist():
                    self._take(row)
                bar.update(self.read + self.bad)
                if time.monotonic() - saved > SAVE_S:
                    self._save()
                    saved = time.monotonic()
        self._save()

    def _units(self) -> Iterator[dict[str, Any]]:
        import ray.cloudpickle as pickle

        start = 0
        for number, task in enumerate(tasks(self.job.pool)):
            if number not in self.done:
                yield {"unit": number, "start": start, "task": pickle.dumps(task)}
            start += len(task["rows"])

    def _take(self, row: dict[str, Any]) -> None:
        if row["unit"] in self.done:
            return
        self.done.add(row["unit"])
        self.read += row["read"]
        self.bad += row["bad"]
        self.named = [*self.named, *json.loads(row["named"])][:NAMED]
        self.nearest.add(
            np.array(row["classes"], np.int64),
            np.array(row["scores"], np.float32),
            np.array(row["rows"], np.int64),
        )

    def _save(self) -> None:
        facts = {
            "done": _spans(sorted(self.done)), "read": self.read, "bad": self.bad, "named": self.named,
        }  # fmt: skip
        columns = self.nearest.settled()
        table = pa.table(dict(zip(("class_index", "score", "row"), columns, strict=True)))
        table = table.replace_schema_metadata({"search": json.dumps(facts)})
        self.job.folder.write_table(FOUND, table)

    def _load(self) -> None:
        table = self.job.folder.read_table(FOUND)
        facts = json.loads((table.schema.metadata or {})[b"search"])
        self.done = {n for start, stop in facts["done"] for n in range(start, stop)}
        self.read, self.bad, self.named = facts["read"], facts["bad"], facts["named"]
        self.nearest.add(*(table[name].to_numpy() for name in ("class_index", "score", "row")))
        log.info("retrieval goes on behind %d images", self.read + self.bad)


def _pool(config: Config) -> dict[str, Any]:
    """The actors with CLIP: as many as the service would have replicas."""
    import ray.data

    clip = config.meaning.clip
    most = clip.replicas if isinstance(clip.replicas, int) else clip.replicas[1]
    return {
        "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        "num_cpus": clip.num_cpus,
        "num_gpus": clip.num_gpus,
    }


def _spans(numbers: list[int]) -> list[list[int]]:
    """[[first, one after the last], ...] of sorted numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1][1] += 1
        else:
            spans.append([number, number + 1])
    return spans


def _write(
    job: RetrievalJob, nearest: Nearest, reference: Folder
) -> tuple[dict[str, int], dict[str, int]]:
    """The tars of all classes, those that are there apart; by class: images, and copies left out."""
    import ray.data

    kept = job.folder.child("classes")
    todo, counts = [], {}
    own = nearest.shared_out()
    for label in range(len(job.meanings)):
        if job.folder.exists(tar_name(label)) and kept.exists(f"{label}.json"):
            counts[label] = kept.read_json(f"{label}.json")
        elif label in own:
            scores, rows = own[label]
            todo.append({"class_index": label, "rows": rows.tolist(), "scores": scores.tolist()})
        else:
            counts[label] = [0, 0]
    if todo:
        config = job.config
        stream: Any = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            Writer,
            fn_constructor_args=(config.meaning.clip, reference, config.data.max_pixels),
            fn_constructor_kwargs={
                "pool": job.pool,
                "class_names": job.real.class_names,
                "per_class": job.per_class,
                "to": job.folder,
            },
            batch_size=1,
            **_pool(config),
        )
        with Bar("writing", len(job.meanings), "classes", done=len(counts)) as bar:
            for found in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in found.to_pylist():
                    counts[row["class_index"]] = [row["written"], row["copies"]]
                    kept.write_json(f"{row['class_index']}.json", [row["written"], row["copies"]])
                bar.update(len(counts))
    names = job.real.class_names
    return tuple({name: counts[at][n] for at, name in enumerate(names)} for n in (0, 1))  # type: ignore[return-value]


def _record(
    job: RetrievalJob, search: _Search, written: dict[str, int], copies: dict[str, int]
) -> None:
    """`retrieval.json`, and what is worth a line."""
    short = [f"{name} ({count})" for name, count in written.items() if count < job.per_class]
    if short:
        log.warning(
            "the pool has fewer than %d images nearest to: %s", job.per_class,
            shortened(short, 5, what="classes"),
        )  # fmt: skip
    if search.bad:
        log.warning(
            "%d images of the pool cannot be used, such as %s", search.bad,
            shortened(search.named, 3),
        )  # fmt: skip
    clip = job.config.meaning.clip
    job.folder.write_json(
        RECORD,
        {
            "identity": job.identity,
            "pool": job.place,
            "images": len(job.pool),
            "looked_at": search.read,
            "unreadable": search.bad,
            "unreadable_such_as": search.named,
            "clip": {"model": clip.model, "pretrained": clip.pretrained},
            "meanings": dict(zip(job.real.class_names, job.meanings, strict=True)),
            "per_class": job.per_class,
            "retrieved": written,
            "copies_left_out": copies,
        },
    )
    job.folder.delete(FOUND)


def _is_done(job: RetrievalJob) -> bool:
    """Raises UserError where the folder holds another retrieval, begun or done."""
    for name in (RECORD, BEGUN):
        if not job.folder.exists(name):
            continue
        if job.folder.read_json(name).get("identity") != job.identity:
            raise UserError(
                f"{job.folder.address()} holds a retrieval of another pool, other classes or settings: "
                "give another folder with --out, or delete this one"
            )
        if name == RECORD:
            log.info("retrieval: done before, in %s", job.folder.address())
            return True
    return False


def _meanings(run: Folder, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """The run's meanings of these classes; their names where it has none yet."""
    found: dict[str, Any] = {}
    if run.exists(MEANINGS):
        found = {entry["class_name"]: entry.get("choice") for entry in read_meanings(run)}
    else:
        log.warning(
            "the run has no meanings yet: images are sought by class names alone; `ray-synth "
            "disambiguate` first finds out what they mean"
        )
    return tuple(found.get(name) or name for name in class_names)
