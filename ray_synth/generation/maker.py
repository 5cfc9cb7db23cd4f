"""The actor of the generator pool: chunks of the plan in, image rows out, each chunk kept as a part.

Two chunks are at work at once: while one is on the device, the last one is judged, encoded (in as many
threads as the actor has CPUs: PIL releases the GIL) and written.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ray_synth import metrics
from ray_synth.config import ClipConfig, GenerationConfig
from ray_synth.data.images import encode_image
from ray_synth.device import pick_device
from ray_synth.generation.checking import set_aside
from ray_synth.generation.cost import reason_label
from ray_synth.generation.packs import group_rows
from ray_synth.generation.store import (
    IMAGE_SCHEMA,
    ImageStore,
    pack_name,
    pack_range,
    part_name,
)
from ray_synth.generation.usefulness import Attempt, candidates, choose
from ray_synth.generators.learner import Steering, SteeringLearner, steer
from ray_synth.generators.protocol import Row, generate_all, provenance, raised
from ray_synth.generators.registry import fingerprint, generator_class
from ray_synth.monitoring import logs
from ray_synth.prompting.plan_file import Plan
from ray_synth.storage.damage import DamagedFile
from ray_synth.storage.folder import Folder

if TYPE_CHECKING:
    from PIL import Image

    from ray_synth.generation.quality import Judge, Verdict


log = logging.getLogger("ray_synth")


@dataclass(frozen=True)
class GenerationJob:
    """What a pool of makers works on, by value.

    Attributes:
        config: the generation section; what it leaves "auto" is settled by `stream.settled`.
        plan: the rows to make.
        store: where they are kept.
        run: the run's folder, with the real images that guide (`references.parquet`) and the
            thresholds of quality (`quality/`); None where neither is used.
        clip: the model that judges; None judges without one.
        board: the progress board's handle.
        pack_rows: rows of the plan that are packed into one large part; default: by their size.
        packer: the handle of the actor that hears which chunks are made (`packs.py`), or None.
        steering: from which row of the plan on each learner guides the sampler, or chooses what is
            kept, in the order of the rows; before the first, none does.
    """

    config: GenerationConfig
    plan: Plan
    store: ImageStore
    run: Folder | None = None
    clip: ClipConfig | None = None
    board: Any = None
    pack_rows: int | None = None
    packer: Any = None
    steering: tuple[tuple[int, Steering], ...] = ()

    def steered_by(self, position: int) -> Steering | None:
        """What steers a row of the plan."""
        return next((found for first, found in reversed(self.steering) if first <= position), None)


class Models:
    """The generator and the CLIP of a process, loaded when they are first needed.

    Makers of several jobs share them where the jobs differ in nothing that they are loaded by; `device`
    is held by the one whose batch is made.
    """

    def __init__(self) -> None:
        self.device = threading.Lock()
        self.generator: Any = None
        self.fingerprint = ""
        self._clip: Any = None

    def load(self, config: GenerationConfig) -> None:
        """The generator, where it is not loaded yet."""
        if self.generator is None:
            generator = generator_class(config.generator)(config)
            self.fingerprint = fingerprint(config)
            self.generator = generator

    def clip(self, config: ClipConfig) -> Any:
        """The CLIP model that judges."""
        from ray_synth.meaning.clip import load_clip

        if self._clip is None:
            self._clip = load_clip(config)
        return self._clip


class ImageMaker:
    """Makes what the store lacks of each chunk, and reads back the rest.

    Args:
        models: shared with makers of other jobs; default: its own.
    """

    def __init__(self, job: GenerationJob, models: Models | None = None) -> None:
        self.job, self.store = job, job.store
        self._models, self._loaded = models or Models(), False
        self._plan = threading.Lock()
        self._judge: Judge | None = None
        self._steering: Steering | None = None
        self._learner: SteeringLearner | None = None
        self._references: dict[str, bytes] = {}
        self._near: tuple[str, int, pa.Table] | None = (
            None  # rows of a pack, from a row of the plan
        )
        self._pack: tuple[int, str] = (-1, "")
        self._encoders = ThreadPoolExecutor(max(1, int(job.config.num_cpus)))
        metrics.join(job.run.uri if job.run else "")
        logs.forward(job.board, stage="generation")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The image rows of some chunks (columns start, stop, parts), in order."""
        made = [row for chunk in batch.to_pylist() for row in self.chunk(**chunk)]
        return pa.Table.from_pylist(made, schema=IMAGE_SCHEMA)

    def chunk(self, start: int, stop: int, parts: list[str]) -> list[Row]:
        """Image rows of plan rows `start` to `stop`; `parts` hold those that are made."""
        with self._plan:
            rows = self.job.plan.rows(start, stop)
        done = self._stored(rows, start, parts)
        missing = [row for row in rows if row["sample_id"] not in done]
        if missing:
            # Where this task died after its write and is tried again, its part is there, or packed.
            names = [part_name([row["sample_id"] for row in missing]), *self._pack_of(start)]
            name = next((name for name in names if self.store.holds(name)), None)
            held = {} if name is None else self._stored(missing, start, [name])
            done |= held
            lacking = [row for row in missing if row["sample_id"] not in held]
            if lacking:
                place = {row["sample_id"]: at for at, row in enumerate(rows, start)}
                by_learner = groupby(
                    lacking, lambda row: self.job.steered_by(place[row["sample_id"]])
                )
                new = [row for found, some in by_learner for row in self.make([*some], found)]
                with metrics.timed("store_write_seconds"):
                    self.store.write(new)
                metrics.record("generated_images_total", len(new))
                self._tell_faults(new, f"{start}-{stop}")
                done |= {row["sample_id"]: row for row in new}
            if self.job.packer is not None:
                self.job.packer.made.remote(start)
        result = [done[row["sample_id"]] for row in rows]
        self._count(result, {row["sample_id"] for row in missing})
        return result

    def make(self, rows: list[Row], steering: Steering | None = None) -> list[Row]:
        """Generate, judge and encode; with policy `retry`, again with new seeds what was rejected.

        Where a learner selects, so many seeds of each row are tried first, and the hardest is kept.
        """
        self._load()
        checks = self.job.config.checks
        retries = NEW_SEEDS if checks.policy == "retry" else 0
        tries = candidates(steering)
        found = self._candidates(rows, steering) if tries > 1 else self._attempt(rows, 0, steering)
        done = {row["sample_id"]: row for row in found.made}
        again = found.again
        earlier: list[Row] = []
        for attempt in range(tries, tries + retries):
            if not again:
                break
            earlier += [done[row["sample_id"]] for row in again]
            found = self._attempt(again, attempt, steering)
            again = found.again
            done |= {row["sample_id"]: row for row in found.noted()}
        if earlier:
            self.store.rejected.write(earlier)
            count_faults(earlier, "retried")
        return [done[row["sample_id"]] for row in rows]

    def _candidates(self, rows: list[Row], steering: Steering | None) -> Attempt:
        """The best of several attempts at each row."""
        tries = candidates(steering)
        chosen = choose([self._attempt(rows, attempt, steering) for attempt in range(tries)])
        if self.job.board is not None:
            self.job.board.add_all.remote({"passed_over": (tries - 1) * len(rows)})
        return replace(chosen, made=chosen.noted())

    def _attempt(self, rows: list[Row], attempt: int, steering: Steering | None) -> Attempt:
        """What is made of plan rows with the seeds of an attempt, and what another seed may help."""
        inputs = [
            {**row, "seed": attempt_seed(row["seed"], attempt), **self._reference(row)}
            for row in rows
        ]
        with self._models.device:
            learner = self._steer(steering)
            started = time.perf_counter()
            results = generate_all(self._models.generator, inputs)
            seconds = time.perf_counter() - started
            self._count_batch(len(rows), seconds)
            facts = {
                "attempt": attempt,
                "generator": self._made_by(steering),
                "gpu_seconds": seconds / len(rows),
            }
        images = [image for image, _ in results]
        verdicts = self._judge_all(rows, images)
        selects = learner is not None and candidates(steering) > 1
        entropies = learner.entropies(images) if learner and selects else [None] * len(rows)
        encoded = self._encode(images)
        made = [
            {**row, **facts, **self._judged(image, reason, verdict), "image": data}
            for row, (image, reason), verdict, data in zip(
                rows, results, verdicts, encoded, strict=True
            )
        ]
        again = [
            row
            for row, new, result in zip(rows, made, results, strict=True)
            if not new["accepted"] and not raised(*result)
        ]
        return Attempt(made, again, entropies)

    def _steer(self, steering: Steering | None) -> SteeringLearner | None:
        """Have the generator be guided as these rows are to be; the learner that steers them."""
        if steering != self._steering:
            device = pick_device(self.job.config.device)
            self._steering, self._learner = None, steer(self._models.generator, None, device)
            self._learner = steer(self._models.generator, steering, device)
            self._steering = steering
        return self._learner

    def _made_by(self, steering: Steering | None) -> str:
        """The `generator` column."""
        config = self.job.config
        if steering is None:
            return provenance(self._models.generator, config, self._models.fingerprint)
        digest = steering.fingerprint(self._models.fingerprint)
        return provenance(self._models.generator, config, digest, steering=steering.facts())

    def _encode(self, images: list[Image.Image | None]) -> list[bytes]:
        """The bytes of each image, empty where there is none."""

        def encode(image: Image.Image | None) -> tuple[bytes, float]:
            started = time.perf_counter()
            data = b"" if image is None else encode_image(image, **self.job.config.encoding)
            return data, time.perf_counter() - started

        encoded = list(self._encoders.map(encode, images))
        if self.job.board is not None:
            seconds = sum(seconds for _, seconds in encoded)
            self.job.board.add_all.remote({"encode_seconds": seconds})
        return [data for data, _ in encoded]

    def _judged(
        self, image: Image.Image | None, reason: str, verdict: Verdict | None
    ) -> dict[str, Any]:
        """What is known of an image besides its row and its bytes."""
        fault = verdict.reason if verdict and image is not None else ""
        flagged = self.job.config.checks.policy == "flag"
        return {
            "width": image.width if image else 0,
            "height": image.height if image else 0,
            "clip_score": verdict.clip_score if verdict else None,
            "embedding": verdict.embedding if verdict else None,
            "accepted": image is not None and (not fault or flagged),
            "reject_reason": str(reason) or fault,
        }

    def _load(self) -> None:
        with self._models.device:
            if self._loaded:
                return
            config = self.job.config
            self._judge = self._load_judge()
            self._references = read_references(self.job.run) if config.reference else {}
            self._models.load(config)
            self._loaded = True

    def _load_judge(self) -> Judge | None:
        checks = self.job.config.checks
        if checks.policy == "off":
            return None
        from ray_synth.generation.quality import Judge
        from ray_synth.generation.thresholds import load_reference

        if self.job.clip is None or self.job.run is None or not checks.need_clip:
            return Judge(None, None)
        reference = load_reference(self.job.run.child("quality"))
        clip = self._models.clip(self.job.clip)
        return Judge(reference, clip, scores=checks.clip, labels=checks.label)

    def _judge_all(
        self, rows: list[Row], images: list[Image.Image | None]
    ) -> list[Verdict] | list[None]:
        if self._judge is None:
            return [None] * len(rows)
        return self._judge.judge(rows, images)

    def _reference(self, row: Row) -> dict[str, bytes]:
        if self.job.config.reference is None or not row.get("reference"):
            return {}
        return {"reference_image": self._references[row["reference"]]}

    def _stored(self, rows: list[Row], start: int, parts: list[str]) -> dict[str, Row]:
        """Those of the rows that the parts hold; `start` is the first one's place in the plan."""
        wanted, stop = {row["sample_id"] for row in rows}, start + len(rows)
        found: dict[str, Row] = {}
        for name in parts:
            for table in self._tables(name, start, stop):
                found |= {r["sample_id"]: r for r in table.to_pylist() if r["sample_id"] in wanted}
        for name in parts:  # packs of an earlier plan, in which the rows stood elsewhere
            if len(found) < len(wanted) and pack_range(name) is not None:
                with self._setting_aside(name), suppress(FileNotFoundError):
                    for table in self.store.groups(name, ids=wanted - set(found)):
                        found |= {row["sample_id"]: row for row in table.to_pylist()}
        return found

    def _tables(self, name: str, start: int, stop: int) -> list[pa.Table]:
        """What a part, or the pack that has its place, holds of some rows of the plan."""
        tables: list[pa.Table] = []
        packs: list[str] = []
        with self._setting_aside(name):
            try:
                tables = [self._read(name, start, stop)]
            except FileNotFoundError:  # packed since the store was listed
                packs = [pack for pack in self.store.parts() if _overlaps(pack, start, stop)]
        for pack in packs:
            with self._setting_aside(pack):
                tables.append(self._read(pack, start, stop))
        return tables

    @contextmanager
    def _setting_aside(self, name: str) -> Iterator[None]:
        """A block that reads a part; one that is damaged counts as missing: its rows are made again."""
        try:
            yield
        except DamagedFile as error:
            log.warning("set aside, and its images are made again: %s", error)
            set_aside(self.store, name)

    def _read(self, name: str, start: int, stop: int) -> pa.Table:
        """A part; of a pack the rows that its name places there, and some that follow are kept."""
        span = pack_range(name)
        if span is None:
            return self.store.read(name)
        first = min(max(start, span[0]), span[1])
        last = max(first, min(stop, span[1]))
        near = self._near
        if (
            near is None
            or near[0] != name
            or not near[1] <= first <= last <= near[1] + len(near[2])
        ):
            more = max(last, first + group_rows(self.job.config))
            table = self.store.read_rows(name, first - span[0], more - span[0])
            self._near = near = (name, first, table)
        return near[2].slice(first - near[1], last - first)

    def _pack_of(self, start: int) -> list[str]:
        """The name of the pack that a row may have been put into since the stream began."""
        rows = self.job.pack_rows
        if self.job.packer is None or not rows:
            return []
        number = start // rows
        with self._plan:
            if self._pack[0] != number:
                ids = self.job.plan.ids_of(number * rows, (number + 1) * rows)
                self._pack = (number, pack_name(ids, number * rows))
            return [self._pack[1]]

    def _count_batch(self, rows: int, seconds: float) -> None:
        size = int(getattr(self._models.generator, "batch_size", self.job.config.batch_size))
        metrics.record("generator_seconds_total", seconds)
        metrics.record("generator_rows_total", rows)
        metrics.record("generator_places_total", -(-rows // size) * size)

    def _tell_faults(self, rows: list[Row], chunk: str) -> None:
        """Count what the checks found, and keep a line of it in the run's log."""
        for outcome, accepted in (("rejected", False), ("flagged", True)):
            found = [row for row in rows if row["accepted"] is accepted and row["reject_reason"]]
            if not found:
                continue
            reasons = count_faults(found, outcome)
            said = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
            ids = [row["sample_id"] for row in found[:8]]
            log.debug(
                "%d of %d images %s: %s", len(found), len(rows), outcome, said,
                extra={"chunk": chunk, "sample_ids": ids, "reason": found[0]["reject_reason"]},
            )  # fmt: skip

    def _count(self, rows: list[Row], new: set[str]) -> None:
        if self.job.board is not None:
            made = [row for row in rows if row["sample_id"] in new]
            counts = {
                "images": len(rows),
                "made": len(made),
                "rejected": sum(not row["accepted"] for row in rows),
                "gpu_seconds": sum(row["gpu_seconds"] for row in made),
            }
            self.job.board.add_all.remote(counts)


def _overlaps(name: str, start: int, stop: int) -> bool:
    span = pack_range(name)
    return span is not None and span[0] < stop and start < span[1]


def count_faults(rows: list[Row], outcome: str) -> Counter[str]:
    """Count rows in the metrics by the reason that a check gave; the reasons."""
    reasons = Counter(reason_label(row["reject_reason"]) for row in rows)
    for reason, count in reasons.items():
        metrics.record("faulty_images_total", count, outcome=outcome, reason=reason)
    return reasons


def attempt_seed(seed: int, attempt: int) -> int:
    """The seed of a row's attempt: its own, then 48-bit digests of it."""
    if attempt == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{attempt}".encode()).digest()[:6], "big")


NEW_SEEDS = 2  # tried with policy retry
REFERENCES = "references.parquet"


def write_references(run: Folder, images: dict[str, bytes]) -> None:
    """Keep the real images that guide generation, by their ids, in the run's folder."""
    table = pa.table(
        {
            "image_id": pa.array(list(images), pa.string()),
            "image": pa.array(list(images.values()), pa.binary()),
        }
    )
    run.write_table(REFERENCES, table)


def read_references(run: Folder | None) -> dict[str, bytes]:
    assert run is not None, "image-to-image rows need the run's folder"
    table = run.read_table(REFERENCES)
    return dict(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
