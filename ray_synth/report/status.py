"""How a run stands, read from its directory alone: no Ray, no cluster, from anywhere that can read it.

What stages left says what is done; `progress.json` (heartbeat.py) what is under way. Without that file,
of an older run, counts come from the files.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.fs as pafs

from ray_synth.config import BASELINES, of_today, read_run_config
from ray_synth.errors import UserError, duration
from ray_synth.generation.cost import reason_label
from ray_synth.generation.store import pack_range
from ray_synth.monitoring.heartbeat import PROGRESS, process_lives
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.prompting.rounds import CARD, ROUNDS
from ray_synth.stages import STAGES, TABLE
from ray_synth.storage.damage import DamagedFile, damaged
from ray_synth.storage.folder import Folder
from ray_synth.storage.secrets import redact

DONE, RUNNING, SILENT = 0, 3, 4  # exit codes
PATIENCE_S = 120.0  # without a heartbeat; or four beats, where that is more
STALL_S = (
    300.0  # without a count that moves; or the config's no_progress_timeout_s, where that is more
)
RECENT_S = 600.0  # parts of this time tell the rate
MOST_READ = 64  # parts whose rows are looked at; of more, the newest


@dataclass(frozen=True)
class StageStatus:
    """One line of the table.

    Attributes:
        state: done, under way, begun (and left), or waiting.
        seconds: that a finished stage took, or that one has been under way for.
        done, total: counted in `unit`; None where nothing is counted.
        left_s: by the recent rate.
    """

    name: str
    state: str = "waiting"
    seconds: float | None = None
    done: int | None = None
    total: int | None = None
    unit: str = ""
    left_s: float | None = None
    note: str = ""


@dataclass(frozen=True)
class RunStatus:
    """How a run, or a workspace of studies, stands.

    Attributes:
        verdict: done, running, stalled, silent, killed, stopped or failed.
        exit_code: 0 done, 3 running, 4 all others.
        silent_s: seconds since the last sign of life.
        rejected: images by what a check said of them, of `judged` images that were looked at.
        damaged: what files that were looked at say of themselves, each with the fix.
    """

    run: str
    verdict: str
    message: str
    exit_code: int
    stages: list[StageStatus]
    silent_s: float
    judged: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Images:
    """What lies in a store.

    Attributes:
        stored: rows; counted where `exact`, else the small parts times their usual size, and what the
            names of the large ones say.
        rate: recent rows per second, or None.
        newest: when the last part came, seconds since 1970.
    """

    stored: int = 0
    planned: int | None = None
    exact: bool = True
    rate: float | None = None
    newest: float = 0.0
    judged: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def read_status(folder: Folder, now: float | None = None) -> RunStatus:
    """Look at a run directory, or at a workspace of studies.

    Raises:
        UserError: there is no run.
    """
    now = time.time() if now is None else now
    if folder.exists("config.yaml"):
        return _run_status(folder, now)
    for studies in (folder, folder.child("studies")):
        if studies.exists(PROGRESS) or files(studies.child("arms/models")):
            return _studies_status(studies, now)
    raise UserError(f"no run at {folder.uri}: it has no config.yaml; give a run's directory or URI")


def _run_status(folder: Folder, now: float) -> RunStatus:
    top = files(folder)
    beat = _beat(folder)
    config = read_run_config(folder)
    records, broken = _records(folder)
    images = read_images(folder)
    arms = _arms(folder, config)
    signs = [*top.values(), *files(folder.child("stages")).values(), images.newest]
    signs += [at for _, at in arms.values()]
    signs.append(min(beat.get("time", 0.0), now))
    lives = _lives(beat, now)
    since = {item["stage"]: item["since"] for item in beat.get("stages", [])} if lives else {}
    counts = _counts(folder, beat, images, arms, config)
    stages = []
    for name in STAGES:
        record = records.get(f"{name}.json")
        bar = counts.get(name, {})
        # A live feed trains while images are made.
        under_way = name in since or (lives and name == "generation" and bool(bar.get("done")))
        if record is not None:
            stages.append(StageStatus(name, "done", record["seconds"], **_count_of(bar)))
        elif under_way:
            seconds = now - since[name] if name in since else None
            left = _left(bar, images.rate if name == "generation" else None)
            stages.append(StageStatus(name, "under way", seconds, left_s=left, **_count_of(bar)))
        else:
            state = "begun" if bar.get("done") else "waiting"
            stages.append(StageStatus(name, state, **_count_of(bar)))
    complete = "metrics.json" in top and "evaluation.json" in records
    moved = max(beat.get("moved", 0.0), images.newest, *(at for _, at in arms.values()), 0.0)
    silent = max(0.0, now - max(signs))
    limit = float((config.get("cluster") or {}).get("no_progress_timeout_s") or 0)
    verdict, message, code = _verdict(
        beat, stages, complete=complete, lives=lives, silent=silent, still=now - moved, limit=limit
    )
    return RunStatus(
        redact(folder.uri), verdict, message, code, stages, silent, images.judged, images.rejected,
        [*broken, *images.damaged],
    )  # fmt: skip


def _verdict(
    beat: dict[str, Any],
    stages: list[StageStatus],
    *,
    complete: bool,
    lives: bool,
    silent: float,
    still: float,
    limit: float,
) -> tuple[str, str, int]:
    """What all that means: a word, a sentence, and the exit code."""
    stall = max(STALL_S, limit)
    if lives and beat["bars"] and still > stall:
        text = f"its driver lives, but nothing has moved for {duration(still)}: likely stalled"
        return "stalled", f"{text}; see docs/operations.md", SILENT
    if complete and not lives:
        seconds = sum(stage.seconds or 0 for stage in stages)
        return "done", f"all stages, in {duration(seconds)}; see report/index.html", DONE
    if lives or (not beat and silent < stall):
        return "running", f"last sign of life {duration(silent)} ago", RUNNING
    return _ended(beat, duration(silent))


def _ended(beat: dict[str, Any], ago: str) -> tuple[str, str, int]:
    """The same where nobody is at work, and not all is done."""
    again = "the same command continues"
    state = beat.get("state")
    if state == "ended":
        return "done", f"up to {beat['until']}, as requested", DONE
    if state == "failed":
        return "failed", f"{ago} ago: {beat['error']}; fix that, and {again}", SILENT
    if state == "stopped":
        return "stopped", f"by hand, {ago} ago; {again}", SILENT
    if state == "running" and process_lives(beat) is False:
        return "killed", f"its process is gone, last sign of life {ago} ago; {again}", SILENT
    return "silent", f"for {ago}: likely dead or stalled; {again}", SILENT


def _lives(beat: dict[str, Any], now: float) -> bool:
    """Whether the driver's heartbeat goes on."""
    if beat.get("state") != "running":
        return False
    patience = max(PATIENCE_S, 4 * beat["every_s"])
    return now - beat["time"] < patience and process_lives(beat) is not False


def read_images(folder: Folder) -> Images:
    """The store of a run, by its listing and a look at some parts."""
    store = folder.child("images")
    parts = {
        name: at
        for name, at in files(store).items()
        if name.startswith("part-") and name.endswith(".parquet")
    }
    told: list[str] = []
    planned = None
    try:
        planned = len(PlanFile(folder)) if folder.exists("plan.parquet") else None
    except DamagedFile as error:
        told.append(redact(str(error)))
    if not parts:
        return Images(planned=planned, damaged=told)
    small = {name: at for name, at in parts.items() if pack_range(name) is None}
    packed = sum(stop - start for start, stop in filter(None, map(pack_range, parts)))
    newest = sorted(small, key=lambda name: small[name])[-MOST_READ:]
    # Where all is packed, the newest pack tells what was rejected.
    newest = newest or [max(parts, key=lambda name: parts[name])]

    def look(name: str) -> list[tuple[bool, str]] | None:
        try:
            table = store.read_table(name, ["accepted", "reject_reason"])
        except FileNotFoundError:  # deleted since it was listed, by --force-stage
            return None
        except DamagedFile as error:
            told.append(redact(str(error)))
            return None
        return list(zip(*(table[column].to_pylist() for column in table.column_names), strict=True))

    with ThreadPoolExecutor(16) as pool:
        looked = [rows for rows in pool.map(look, newest) if rows is not None]
    faults = Counter(
        f"{'flagged' if accepted else 'rejected'}: {reason_label(reason)}"
        for rows in looked
        for accepted, reason in rows
        if reason
    )
    judged = sum(map(len, looked))
    usual = statistics.median(map(len, looked)) if looked and small else 0
    exact = len(small) <= MOST_READ
    stored = packed + (judged if exact and small else round(usual * len(small)))
    # A pack is written at once: only the small parts tell how fast images are made.
    last = max(parts.values())
    recent = sorted(at for at in small.values() if at >= last - RECENT_S)
    took = recent[-1] - recent[0] if recent else 0.0
    return Images(
        stored=stored if planned is None else min(stored, planned),
        planned=planned,
        exact=exact,
        rate=usual * (len(recent) - 1) / took if len(recent) > 2 and took > 0 else None,
        newest=last,
        judged=judged,
        rejected=dict(faults.most_common()),
        damaged=sorted(told),
    )


def _arms(folder: Folder, config: dict[str, Any]) -> dict[str, tuple[int | None, float]]:
    """Arm -> its last step on record (None where its model is finished), and since when."""
    training = config.get("training") or {}
    baseline = of_today("training.baseline", training.get("baseline", "matched"))
    names = [*BASELINES[baseline], "mixed"]
    models = files(folder.child("models"))
    checkpoints = folder.child("checkpoints")
    found: dict[str, tuple[int | None, float]] = {}
    for arm in names:
        if f"{arm}.json" in models:
            found[arm] = (None, models[f"{arm}.json"])
            continue
        for run in folders(checkpoints):
            if not run.startswith(f"{arm}-"):
                continue
            name = "checkpoint_manager_snapshot.json"
            at = files(checkpoints.child(run)).get(name)
            record = _json(checkpoints.child(run), name) if at else None
            latest = (record or {}).get("latest_checkpoint_result")
            if at and latest and at > found.get(arm, (0, 0.0))[1]:
                found[arm] = (int(latest["metrics"]["step"]), at)
    return found


def _counts(
    folder: Folder,
    beat: dict[str, Any],
    images: Images,
    arms: dict[str, tuple[int | None, float]],
    config: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """By stage, what a bar would show; a heartbeat's own bars where they know more."""
    bars = {bar["name"]: bar for bar in beat.get("bars", [])}
    counts: dict[str, dict[str, Any]] = {}
    for stage in TABLE:
        for name in set(stage.bars) & set(bars):
            counts[stage.name] = dict(bars[name])
    if images.planned is not None:
        bar = {"done": images.stored, "total": images.planned, "unit": "images"}
        note = " ".join(
            filter(None, [_round_note(folder, config), "" if images.exact else "about"])
        )
        counts["generation"] = {**bar, "note": note, "rate": images.rate}
    total = (config.get("training") or {}).get("steps")
    for arm, (step, _) in arms.items():
        if step is None:
            note = f"{arm} is trained"
            counts["training"] = {"note": note}
        else:
            counts["training"] = {"done": step, "total": total, "unit": "steps", "note": arm}
    for name, bar in bars.items():
        if name.startswith("training "):
            arm = name.removeprefix("training ")
            done = max(bar["done"], arms.get(arm, (0, 0.0))[0] or 0)
            counts["training"] = {**bar, "done": done, "note": arm}
    return counts


def _round_note(folder: Folder, config: dict[str, Any]) -> str:
    """`round 2 of 4:`, where the plan comes in rounds; it is counted from 1."""
    rounds = ((config.get("prompting") or {}).get("practice") or {}).get("rounds")
    planned = [name for name in files(folder.child(ROUNDS)) if CARD.fullmatch(name)]
    return f"round {len(planned)} of {rounds}:" if rounds and planned else ""


def _count_of(bar: dict[str, Any]) -> dict[str, Any]:
    return {key: bar[key] for key in ("done", "total", "unit", "note") if key in bar}


def _left(bar: dict[str, Any], rate: float | None) -> float | None:
    rate = rate or bar.get("rate")
    if not rate or bar.get("total") is None:
        return None
    return max(0, bar["total"] - bar["done"]) / rate


def _studies_status(folder: Folder, now: float) -> RunStatus:
    beat = _beat(folder)
    models = files(folder.child("arms/models"))
    trained = [at for name, at in models.items() if name.endswith(".json")]
    reports = [
        at
        for name in folders(folder)
        if (at := files(folder.child(name)).get("study.json")) is not None
    ]
    lives = _lives(beat, now)
    bars = {bar["name"]: bar for bar in beat.get("bars", [])}
    total = bars.get("trainings", {}).get("total")
    left = _left(bars["trainings"], None) if "trainings" in bars and lives else None
    state = "under way" if lives else "begun"
    stages = [
        StageStatus("sources", state, done=len(folders(folder.child("sources"))), unit="runs"),
        StageStatus(
            "trials", state, done=len(trained), total=total, unit="trained, of all studies",
            left_s=left,
        ),
        StageStatus("studies", state, done=len(reports), unit="reported"),
    ]  # fmt: skip
    signs = [min(beat.get("time", 0.0), now), *trained, *reports]
    silent = max(0.0, now - max(signs))
    verdict, message, code = _verdict(
        {**beat, "bars": []}, stages, complete=False, lives=lives, silent=silent, still=0, limit=0
    )
    return RunStatus(redact(folder.uri), verdict, message, code, stages, silent)


def files(folder: Folder) -> dict[str, float]:
    """Name -> time of last change, seconds since 1970, of the whole files of a folder."""
    return {
        info.base_name: info.mtime_ns / 1e9
        for info in _listed(folder)
        if info.is_file and not info.base_name.startswith(".")
    }


def folders(folder: Folder) -> list[str]:
    return sorted(i.base_name for i in _listed(folder) if i.type == pafs.FileType.Directory)


def _listed(folder: Folder) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(folder.path(), allow_not_found=True)
    return folder.filesystem.get_file_info(selector)


def _beat(folder: Folder) -> dict[str, Any]:
    """The heartbeat; nothing where there is none, or what is there is none."""
    beat = _json(folder, PROGRESS)
    needed = {"state", "time", "every_s", "until", "bars", "stages"}
    return beat if isinstance(beat, dict) and needed <= beat.keys() else {}


def _records(folder: Folder) -> tuple[dict[str, Any], list[str]]:
    """What finished stages left, by file name; and what is told of records that are none."""
    found, damaged_ones = {}, []
    for name in files(folder.child("stages")):
        record = _json(folder, f"stages/{name}")
        if isinstance(record, dict) and (name.endswith(".begun.json") or "seconds" in record):
            found[name] = record
        else:
            address = folder.address("stages", name)
            damaged_ones.append(redact(str(damaged(address, "it is no record of a stage"))))
    return found, damaged_ones


def _json(folder: Folder, name: str) -> Any:
    """A JSON file; None where it is missing or not whole (Ray Train writes some in place)."""
    try:
        return folder.read_json(name)
    except (FileNotFoundError, DamagedFile):
        return None
