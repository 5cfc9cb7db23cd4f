"""`ray-synth retrieve`: real images of a pool, by CLIP, as a rival of synthetic ones.

In: a config, and a folder of images or tars. Out: `<run>/retrieved/<digest>/images/*.tar`, which serve as
a run's synthetic images. What a killed command has ranked is not ranked again.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa

from ray_synth.cluster.connection import connect
from ray_synth.config import Config, SourceConfig
from ray_synth.data.dataset import ImagesByClass, select, to_ray
from ray_synth.data.pool import Unit, pool_units
from ray_synth.errors import UserError
from ray_synth.generation.retrieval import (
    Best,
    Embedder,
    Question,
    Ranker,
    candidates,
    part_name,
    write_chosen,
)
from ray_synth.generation.thresholds import REAL_PER_CLASS, load_reference, measure_run
from ray_synth.generators.protocol import digest_settings
from ray_synth.meaning.entries import read_meanings
from ray_synth.monitoring.progress import Bar
from ray_synth.pipeline.run import Run
from ray_synth.pipeline.runner import opened, start
from ray_synth.pipeline.steps import inspected, run_words
from ray_synth.prompting.budgets import class_budgets, even_shares, planned
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
RETRIEVED = "retrieved"


def retrieve(
    config: Config, pool: SourceConfig, *, per_class: int | None = None, by_text: bool = False
) -> dict[str, Any]:
    """Choose the nearest images of a pool for each class.

    Args:
        pool: of format imagefolder or webdataset.
        per_class: how many; default: as many as the config would have made, for the run or its studies.
        by_text: by the meanings alone, not by the class's real images as well.

    Returns:
        What `retrieved.json` keeps: `source` as `generator_kwargs` of `imported` take it, `images` of
        the pool, `unreadable` ones, `copies` of test images, and `classes` with how many each has.

    Raises:
        UserError: there is no such pool, nothing in it is near a class, or as `run_pipeline`.
    """
    from ray_synth.service.session import Service

    units = pool_units(pool)
    with opened(config) as run, connect(run.config.cluster), ExitStack() as watching:
        start(run, "meaning", None, watching)
        run = inspected(run)
        if run.records.record("meaning") is None:
            with Service(run.config) as service:
                run_words(run, service, plan=False)
        most = _most(run, per_class)
        folder = run.folder.child(RETRIEVED).child(_digest(run, pool, most, by_text))
        names = _rank(run, units, folder, most, by_text)
        best, counts = Best(most), Counter[str]()
        for at, table, counted in candidates(folder.child("parts"), names):
            best.add(at, table)
            counts.update(counted)
        classes = _write(run, units, best.found(), folder)
    if not sum(classes.values()):
        raise UserError(f"no image of {pool.path} could be read: {counts['images']:,} were tried")
    source = {"format": "webdataset", "path": folder.child("images").address()}
    found = {"pool": pool.path, "source": source, **counts, "classes": classes}
    folder.write_json("retrieved.json", found)
    return found


def _most(run: Run, per_class: int | None) -> np.ndarray:
    """(classes,) int64: how many images of each class are wanted."""
    counts = run.train.counts()
    if per_class:
        return np.full(len(counts), per_class, np.int64)
    prompting = run.config.prompting
    scale = max(prompting.multiplier, run.config.studies.scale)
    wanted = even_shares(len(counts), planned(scale, sum(counts.values())))
    budgets = class_budgets(prompting, counts)
    return wanted if budgets is None else np.maximum(wanted, budgets)


def _digest(run: Run, pool: SourceConfig, most: np.ndarray, by_text: bool) -> str:
    """Of all that decides the choice, the pool's own files apart."""
    clip = run.config.meaning.clip
    choices = [entry["choice"] for entry in read_meanings(run.folder, run.train.class_names)]
    tests = [run.config.data.test.model_dump()]
    tests += [source.model_dump() for source in run.config.data.ood.values()]
    asked = [pool.path, pool.format, most.tolist(), by_text, choices, clip.model, clip.pretrained]
    return digest_settings([asked, tests, run.records.inputs["meaning"]])


def _question(run: Run, most: np.ndarray, by_text: bool, folder: Folder) -> Question:
    """What each class is like, and what the test images are."""
    import ray

    clip = run.config.meaning.clip
    meanings = read_meanings(run.folder, run.train.class_names)
    images = ImagesByClass(select(run.train, REAL_PER_CLASS, run.config.seed))
    measure = ray.remote(num_cpus=clip.num_cpus, num_gpus=clip.num_gpus)(measure_run)
    checks = run.config.generation.checks
    ray.get(measure.remote(images, meanings, clip, checks, int(most.max()), folder))
    features = [np.empty((0, 0), np.float32)]
    for index in run.tests.values():
        found = to_ray(index).map_batches(
            Embedder,
            fn_constructor_args=(clip,),
            batch_size=clip.max_batch_size,
            **_actors(run),
        )
        features += [
            np.stack(list(part["feature"])) for part in found.iter_batches(batch_size=4096)
        ]
    tests = np.concatenate([part for part in features if part.size] or [np.empty((0, 1))])
    tests = tests.astype(np.float32)
    tests /= np.linalg.norm(tests, axis=1, keepdims=True).clip(1e-12)
    return Question.of(load_reference(folder), tests, by_text=by_text)


def _actors(run: Run) -> dict[str, Any]:
    import ray.data

    clip = run.config.meaning.clip
    few, many = (clip.replicas, clip.replicas) if isinstance(clip.replicas, int) else clip.replicas
    pool = ray.data.ActorPoolStrategy(min_size=few, max_size=many)
    return {"compute": pool, "num_cpus": clip.num_cpus, "num_gpus": clip.num_gpus}


def _rank(
    run: Run, units: list[Unit], folder: Folder, most: np.ndarray, by_text: bool
) -> list[str]:
    """Rank the units that are not ranked yet; the names of all parts."""
    import ray.cloudpickle as pickle
    import ray.data

    parts = folder.child("parts")
    names = [part_name(at, unit) for at, unit in enumerate(units)]
    there = set(parts.names(".parquet"))
    todo = [at for at, name in enumerate(names) if name not in there]
    if not todo:
        return names
    question = ray.put(_question(run, most, by_text, folder))
    rows = [{"at": at, "unit": pickle.dumps(units[at])} for at in todo]
    ranked = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Ranker,
        fn_constructor_args=(run.config.meaning.clip, question, parts),
        batch_size=1,
        **_actors(run),
    )
    with Bar("retrieval", len(units), "units", done=len(units) - len(todo)) as bar:
        for _ in ranked.iter_batches(batch_size=1):
            bar.advance()
    return names


def _write(
    run: Run, units: list[Unit], chosen: dict[int, pa.Table], folder: Folder
) -> dict[str, int]:
    """The chosen images as tars, one for each unit that has some; how many each class has."""
    import ray

    images, names = folder.child("images"), run.train.class_names
    wanted = {at: _tar_name(at, units[at], table) for at, table in chosen.items()}
    there = set(images.names(".tar"))
    for name in there - set(wanted.values()):  # of a pool that was another
        images.delete(name)
    write = ray.remote(write_chosen)
    waiting = [
        write.remote(units[at], chosen[at], names, images, name)
        for at, name in wanted.items()
        if name not in there
    ]
    ray.get(waiting)
    counts = Counter[int]()
    for table in chosen.values():
        counts.update(table["class_index"].to_pylist())
    return {name: counts[index] for index, name in enumerate(names)}


def _tar_name(at: int, unit: Unit, table: pa.Table) -> str:
    rows = hashlib.sha256(
        table["row"].to_numpy().tobytes() + table["class_index"].to_numpy().tobytes()
    )
    return f"{at:06d}-{unit.digest[:8]}{rows.hexdigest()[:8]}.tar"
