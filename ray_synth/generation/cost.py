"""What generation gave and what it took: images, rejects, duplicates, hours, their price. No Ray."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_synth.config import Config
from ray_synth.generation.acceptance import NEEDED, Acceptance
from ray_synth.generation.store import ImageStore
from ray_synth.prompting.plan_file import PLAN_FILE, WINDOW, PlanFile
from ray_synth.prompting.plan_index import PlanIndex
from ray_synth.storage.damage import DamagedFile
from ray_synth.storage.filesystems import at_once
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
DUPLICATES = "duplicates.parquet"
REASONS = ("blank", "saturated", "another class", "clip score", "near-duplicate", "copy of a real")
MOST_COMPARED = 500_000  # embeddings of more do not fit the driver


def hours_and_cost(config: Config, actor_seconds: float) -> dict[str, float]:
    """`gpu_hours`, `cpu_hours` and `cost` of the seconds that generator actors were at work.

    An actor is paid for what it reserves, `num_gpus` and `num_cpus`. The cost is 0 where
    `cluster.price_per_gpu_hour` and `price_per_cpu_hour` are.
    """
    hours = actor_seconds / 3600
    gpu_hours, cpu_hours = hours * config.generation.num_gpus, hours * config.generation.num_cpus
    prices = config.cluster
    cost = gpu_hours * prices.price_per_gpu_hour + cpu_hours * prices.price_per_cpu_hour
    return {"gpu_hours": gpu_hours, "cpu_hours": cpu_hours, "cost": cost}


def cost_note(counts: dict[str, float], config: Config) -> str:
    """What stands beside the progress of generation: `1.20 GPU-hours, cost 2.40, 3 rejected`."""
    found = hours_and_cost(config, counts.get("gpu_seconds", 0))
    kind = "GPU" if config.generation.num_gpus else "CPU"
    parts = [f"{found[f'{kind.lower()}_hours']:.3f} {kind}-hours"]
    if found["cost"]:
        parts.append(f"cost {found['cost']:.2f}")
    if counts.get("rejected"):
        parts.append(f"{counts['rejected']:.0f} rejected")
    if counts.get("passed_over"):  # candidates of which a learner kept others
        parts.append(f"{counts['passed_over']:.0f} passed over")
    return ", ".join(parts)


def store_facts(config: Config, run: Folder, store: ImageStore) -> dict[str, Any]:
    """Counts over a finished store, in which each row of the plan is once.

    Returns:
        `num_synthetic` (accepted), `rejected`, `reject_reasons`, `images_per_actor_second`, and
        `facts`: hours, cost, flagged and retried images, mean CLIP score.
    """
    index = PlanIndex(PlanFile(run).ids(WINDOW))
    columns = ["accepted", "gpu_seconds", "clip_score", *NEEDED]
    acceptance = Acceptance()
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    seconds = scores = 0.0
    for _, table in store.planned(index, columns):
        acceptance.add(table)
        accepted, reason = table["accepted"], table["reject_reason"]
        flagged = reason.filter(pc.and_(accepted, pc.not_equal(reason, ""))).to_pylist()
        reasons.update(map(reason_kind, reason.filter(pc.invert(accepted)).to_pylist()))
        flags.update(map(reason_kind, flagged))
        seconds += pc.sum(table["gpu_seconds"]).as_py() or 0.0
        scores += pc.sum(table["clip_score"]).as_py() or 0.0
        counts["made"] += table.num_rows
        counts["accepted"] += pc.sum(accepted).as_py() or 0
        counts["retried"] += pc.sum(pc.greater(table["attempt"], 0)).as_py() or 0
        counts["scored"] += table.num_rows - table["clip_score"].null_count
    made = counts["made"]
    assert made == len(index), f"{len(index)} rows planned, {made} in the store"
    seconds += sum(earlier_attempts(store))
    if config.generation.checks.policy != "off":
        acceptance.save(run)
    return {
        "num_synthetic": counts["accepted"],
        "rejected": made - counts["accepted"],
        "reject_reasons": dict(reasons),
        "images_per_actor_second": made / seconds,
        "facts": {
            **hours_and_cost(config, seconds),
            "flagged": flags.total(),
            "flag_reasons": dict(flags),
            "retried": counts["retried"],
            "clip_score": scores / counts["scored"] if counts["scored"] else None,
            "near_duplicates": write_duplicates(run, store),
        },
    }


def earlier_attempts(store: ImageStore) -> list[float]:
    """The actor seconds of each attempt that was rejected and made again."""

    def read(name: str) -> list[float]:
        try:
            return store.rejected.read(name, ["gpu_seconds"])["gpu_seconds"].to_pylist()
        except DamagedFile as error:  # its images have later attempts: only their cost is lost
            log.warning("not counted: %s", error)
            return []

    return [seconds for found in at_once(read, store.rejected.parts()) for seconds in found]


def write_duplicates(run: Folder, store: ImageStore) -> int | None:
    """Find near-duplicates over the whole store, and list them in `quality/duplicates.parquet`.

    Makers compare an image with its batch and with the real images; this also finds the far ones. In
    plan order the first of a group stays. The list is for whoever uses the images: what was trained
    on while it was made is not taken back.

    Returns:
        How many; None where nothing was embedded, or there are too many images to compare here.
    """
    folder = run.child("quality")
    from ray_synth.generation.quality import find_duplicates
    from ray_synth.generation.thresholds import REFERENCE_FILE, load_reference

    if len(PlanFile(run)) > MOST_COMPARED or not folder.exists(REFERENCE_FILE):
        return None
    ids = run.read_table(PLAN_FILE, ["sample_id"])["sample_id"]
    made = store.table(ids, ["class_index", "embedding"])
    made = made.filter(pc.is_valid(made["embedding"]))
    if not made.num_rows:
        return None
    embeddings = np.stack([np.asarray(row, np.float16) for row in made["embedding"].to_numpy()])
    found = find_duplicates(
        made["sample_id"].to_pylist(),
        made["class_index"].to_numpy(),
        embeddings,
        load_reference(folder).thresholds,
    )
    columns = ("sample_id", "of", "distance")
    table = {name: [getattr(item, name) for item in found] for name in columns}
    schema = pa.schema(
        [("sample_id", pa.string()), ("of", pa.string()), ("distance", pa.float64())]
    )
    folder.write_table(DUPLICATES, pa.table(table, schema=schema))
    return len(found)


def reason_kind(reason: str) -> str:
    """A reason without its figures, for counting: `clip score 0.18 below 0.21` -> `clip score`."""
    return next((kind for kind in REASONS if reason.startswith(kind)), reason)


def reason_label(reason: str) -> str:
    """The same as one of a few words, for a metric's label: what raised is an `error`."""
    if "safety checker" in reason:
        return "safety checker"
    kind = reason_kind(reason)
    return kind if kind in REASONS else "error"
