"""The real images of a run: opened, looked at before anything is spent, and found again at a next start.

A run keeps which files its images were (`data/*.parquet`, by `files.SCHEMA`). A next start of the same
command finds the same images by their names, and says what has changed of them.
"""

from __future__ import annotations

import logging
import urllib.parse
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.config import Config
from ray_synth.data.class_names import read_class_names
from ray_synth.data.dataset import (
    Index,
    drop,
    hold_out,
    load_index,
    load_tests,
    named,
    require_every_class,
    select,
    setting_of,
)
from ray_synth.data.files import Changes, changes, digest, files, with_marks
from ray_synth.data.inspection import inspect, inspect_drawn, refuse_broken, sample
from ray_synth.data.survey import tell_greys
from ray_synth.errors import UserError
from ray_synth.pipeline.records import StageRecords
from ray_synth.stages import FILES
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
INSPECTED = "data/inspected.json"  # by set: what was looked at, of which files
MOST_TESTED = (
    50_000  # images of a test set that are looked at: they are not drawn again, as training's
)
MOST_TRAINED = (
    4_000_000  # training meets the rest of a larger set, and sets aside what it cannot decode
)
TOO_FEW = 10  # of few that were drawn, so many may fail whatever their share
USED, HELD, ASIDE = 1, 2, 3  # roles of images: trained on or tested, held out, set aside
TOLD = 20  # lines for what is set aside; all of it is in the run's records


@dataclass(frozen=True)
class RealSets:
    """The real images of a run.

    Attributes:
        labelled: all training images that carry a class.
        pool: those that are not held out.
        train: what is drawn of the pool; before inspection, what would be if all can be used.
        validation: held out of training.
        tests: the test sets, by name.
    """

    labelled: Index
    pool: Index
    train: Index
    validation: Index
    tests: dict[str, Index]


def open_sets(config: Config, records: StageRecords, folder: Folder, kept_in: Folder) -> RealSets:
    """Index the sets of a config, and find those images again that a run began with.

    Their files become inputs of the stages that depend on them.

    Args:
        kept_in: where it is kept what was looked at of the test sets; runs may share it.

    Raises:
        UserError: something cannot be read, or a class has no image.
    """
    data, seed = config.data, config.seed
    names = read_class_names(data.class_names)
    labelled = require_every_class(load_index(data.train, names), "data.train")
    pool, validation = hold_out(labelled, data.validation)
    train = select(pool, data.train.images_per_class, seed)
    tests = load_tests(data, labelled.class_names, seed, numbering=labelled.numbering)
    for name, index in {
        "data.train": train,
        **{setting_of(n): i for n, i in tests.items()},
    }.items():
        tell_greys(name, index, max_pixels=data.max_pixels)
    sets = RealSets(labelled, pool, train, validation, tests)
    if records.record("data") is not None:
        sets = found_again(config, sets, records, folder)
    for name, index in tests.items():
        _compare_test(setting_of(name), index, records, kept_in)
    return sets


def listing(name: str) -> str:
    """The file of the run directory that keeps the files of a set."""
    return f"data/{urllib.parse.quote(name, safe='')}.parquet"


# At the first start.


def inspect_training(
    config: Config, sets: RealSets, records: StageRecords, folder: Folder
) -> dict[str, Any]:
    """Decode every training image once; the result of stage "data".

    Where a run takes only some of each class, others are drawn in the places of those that cannot be
    decoded.

    Raises:
        UserError: a class has no image left, or too many fail.
    """
    data, pool, index = config.data, sets.pool, sets.train
    result: dict[str, Any] = {"corrupt": [], "files": None, "images": len(sets.labelled)}
    if not is_builtin(pool):
        asked = data.train.images_per_class
        found = inspect_drawn(
            pool, asked, config.seed, max_pixels=data.max_pixels, most=MOST_TRAINED
        )
        _tell(found.corrupt)
        index = select(pool, asked, config.seed, without=found.bad)
        require_every_class(index, "data.train, without its corrupt images,")
        if asked is None or len(found.corrupt) >= TOO_FEW:
            refuse_broken("data.train", int(found.looked.sum()), found.corrupt, data.max_corrupt)
        result["corrupt"] = found.corrupt
        marks = np.zeros(len(sets.labelled), dtype=np.int64)
        marks[_among(sets.labelled, pool)] = found.marks
        table = _used(replace(sets, train=index), found.bad)
        result["files"] = digest(table)
        _keep(table, folder, "data.train", pool, marks)
        records.depend(FILES + "data.train", result["files"], "data")
    return {"num_real": len(index), "counts": index.counts(), **result}


def inspect_tests(config: Config, sets: RealSets, records: StageRecords, kept_in: Folder) -> None:
    """Decode the images of all other sets, of huge ones a sample, unless their files are known.

    Raises:
        UserError: too many of a set fail.
    """
    if records.record("evaluation") is not None:
        return
    known = _inspected(kept_in)
    others = {setting_of(name): index for name, index in sets.tests.items()}
    others["data.validation"] = sets.validation
    for name, index in others.items():
        table = files(index) if len(index) else None
        if table is None or known.get(name, {}).get("files") in (
            digest(table), records.inputs["evaluation"].get(FILES + name)
        ):  # fmt: skip
            continue
        rows = sample(index, MOST_TESTED)
        found = inspect(index.take(rows), max_pixels=config.data.max_pixels)
        log.info("%s: looked at %d of %d images", name, len(rows), len(index))
        _tell(found.corrupt, f"{name}: ")
        refuse_broken(name, len(rows), found.corrupt, config.data.max_corrupt)
        marks, aside = np.zeros(len(index), np.int64), np.zeros(len(index), dtype=bool)
        marks[rows], aside[rows] = found.marks, found.bad
        roles = np.where(aside, ASIDE, USED)
        _keep(_with_roles(table, roles), kept_in, name, index, marks)
        known[name] = {
            "files": digest(table), "images": len(index), "looked_at": len(rows),
            "corrupt": found.corrupt,
        }  # fmt: skip
        kept_in.write_json(INSPECTED, known)


def is_builtin(index: Index) -> bool:
    """Whether the images ship with the package."""
    return all(shard.source.format in ("digits", "uci_digits") for shard in index.shards)


def _tell(corrupt: list[dict[str, str]], where: str = "") -> None:
    for item in corrupt[:TOLD]:
        name = item["image_id"]
        log.warning("%sset aside %s: %s", where, name, item["error"], extra={"sample_id": name})
    if more := len(corrupt[TOLD:]):
        log.warning("%sset aside %d more images; all are in the run's records", where, more)


def _keep(table: pa.Table, folder: Folder, name: str, index: Index, marks: np.ndarray) -> None:
    source = index.shards[0].source
    single = source.format == "imagefolder"
    folder.write_table(listing(name), with_marks(table, source, marks if single else None))


def _used(sets: RealSets, bad: np.ndarray) -> pa.Table:
    """The files of the images that a run trains on, holds out, or has set aside, with their roles.

    Args:
        bad: (rows of the pool,) bool.
    """
    labelled = sets.labelled
    roles = np.zeros(len(labelled), dtype=np.int8)
    roles[_among(labelled, sets.train)] = USED
    roles[_among(labelled, sets.validation)] = HELD
    roles[np.flatnonzero(_among(labelled, sets.pool))[bad]] = ASIDE
    single = labelled.shards[0].source.format == "imagefolder"
    rows = np.flatnonzero(roles) if single else np.arange(len(labelled))
    table = files(labelled.take(rows))
    assert table is not None
    if single:
        at = table.schema.get_field_index("row")
        table = table.set_column(at, "row", pa.array(rows[table["row"].to_numpy()]))
    return _with_roles(table, roles)


def _with_roles(table: pa.Table, roles: np.ndarray) -> pa.Table:
    """With a column `role`: of the rows of the index, or `USED` for files of many images."""
    rows = table["row"].to_numpy()
    found = np.where(rows < 0, USED, roles[rows])
    return table.append_column("role", pa.array(found.astype(np.int8)))


def _among(index: Index, some: Index) -> np.ndarray:
    """(rows,) bool: which rows of an index are among some of it."""
    width = max(index.row.max(initial=0), some.row.max(initial=0)) + 1
    return np.isin(index.shard * width + index.row, some.shard * width + some.row)


# At a next start.


def are_found(records: StageRecords) -> bool:
    """Whether `found_again` has compared the training images with those that were kept."""
    return FILES + "data.train" in records.inputs["data"]


def found_again(config: Config, sets: RealSets, records: StageRecords, folder: Folder) -> RealSets:
    """The sets without what stage "data" set aside; what has changed of the files is told `records`."""
    record = records.record("data")
    assert record is not None
    result = record["result"]
    if "files" not in result:  # of a version that kept none
        return replace(sets, train=drop(sets.train, result["corrupt"]))
    asked = config.data.train.images_per_class
    bad = named(sets.pool, (item["image_id"] for item in result["corrupt"]))
    sets = replace(sets, train=select(sets.pool, asked, config.seed, without=bad))
    was = result["files"]
    if was is None or was == digest(_used(sets, bad)):
        if was is not None:
            records.depend(FILES + "data.train", was, "data")
        return sets
    kept, now = _kept(folder, "data.train"), files(sets.labelled)
    assert now is not None
    found = _changes(kept, now, sets.labelled)
    single = now["row"][0].as_py() >= 0
    if single and asked is not None:  # what it has drawn is all that it uses
        found = replace(found, added=[])
    if found:
        records.depend(FILES + "data.train", digest(now), "data", told=f"data.train: {found}")
        return sets
    records.depend(FILES + "data.train", was, "data")
    if not single:
        return sets
    gone = len(kept) - pc.sum(pc.is_in(kept["name"], now["name"])).as_py()
    if len(now) != result["images"] - gone:
        log.warning(
            "data.train has %d images, and had %d when this run drew its own, which it goes on with; "
            "--force-stage data draws again", len(now), result["images"],
        )  # fmt: skip
    train, validation = (_of_role(sets.labelled, kept, now, role) for role in (USED, HELD))
    return replace(sets, train=train, validation=validation)


def _kept(folder: Folder, name: str) -> pa.Table:
    """What was kept of a set's files; raises UserError where it is gone."""
    if not folder.exists(listing(name)):
        raise UserError(
            f"{name} is not as it was, and {folder.address(listing(name))}, which says how it was, is "
            "gone: give the run a new name, or begin anew with --force-stage data"
        )
    return folder.read_table(listing(name))


def _changes(kept: pa.Table, now: pa.Table, index: Index) -> Changes:
    """As `files.changes`; a picture that was set aside may be gone."""
    found = changes(kept, now, index)
    aside = set(kept.filter(pc.equal(kept["role"], ASIDE))["name"].to_pylist())
    return replace(found, removed=[name for name in found.removed if name not in aside])


def _of_role(index: Index, kept: pa.Table, now: pa.Table, role: int) -> Index:
    names = kept.filter(pc.equal(kept["role"], role))["name"]
    rows = now.filter(pc.is_in(now["name"], names))["row"].to_numpy()
    return index.take(np.sort(rows))


def _compare_test(name: str, index: Index, records: StageRecords, kept_in: Folder) -> None:
    """Make a test set's files an input of the evaluation; what has changed of them is told `records`."""
    table = files(index) if len(index) else None
    if table is None:
        return
    now, told = digest(table), ""
    known = _inspected(kept_in).get(name)
    if known and known["files"] != now:
        found = _changes(_kept(kept_in, name), table, index)
        if found:
            told = f"{name}: {found}"
            if records.record("evaluation") is None:
                log.warning("%s since they were looked at: they are again", told)
        else:
            now = known["files"]
    records.depend(FILES + name, now, "evaluation", told)


def _inspected(kept_in: Folder) -> dict[str, Any]:
    return kept_in.read_json(INSPECTED) if kept_in.exists(INSPECTED) else {}
