"""Log lines: for people, or one JSON object per line; and all of a run's in its `logs/*.jsonl`.

What workers say travels to the driver over the run's board, a few lines per minute of each kind, and is
said there: so it is seen in the terminal, and kept with the run. Secrets are redacted in all of it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from ray_synth.errors import UserError
from ray_synth.monitoring.terminal import fitted
from ray_synth.storage.folder import Folder
from ray_synth.storage.secrets import redact

log = logging.getLogger("ray_synth")
VARIABLE = "RAY_SYNTH_LOG_FORMAT"
FORMATS = ("text", "json")
# What a line may say besides its message; given as `extra=` or by `where`.
FIELDS = (
    "run", "stage", "arm", "class_name", "sample_id", "sample_ids", "step", "chunk", "reason",
    "worker",
)  # fmt: skip
PART_BYTES = 256 << 10  # of a log on an object store, where a file cannot grow
# Lines that a worker may log per minute: of one kind, in all.
MOST_ALIKE, MOST, WINDOW_S = 10, 60, 60.0

_where: ContextVar[dict[str, Any] | None] = ContextVar("where", default=None)
_form = FORMATS[0]
_volume = logging.INFO  # what is finer is for the run's file
_last_file: str | None = None


class TextFormatter(logging.Formatter):
    """`12:30:01 message`."""

    def __init__(self, stream: Any = None) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self.stream = stream

    def format(self, record: logging.LogRecord) -> str:
        text = redact(super().format(record))
        return fitted(text, self.stream) if self.stream is not None else text


class JsonFormatter(logging.Formatter):
    """`{"time": ..., "level": ..., "message": ..., ...}`, with those of `FIELDS` that are known."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": redact(record.getMessage()),
        }
        if record.name != log.name:
            line["logger"] = record.name
        known = {**(_where.get() or {}), **record.__dict__}
        for field in FIELDS:
            if (value := known.get(field)) is not None:
                line[field] = redact(value) if isinstance(value, str) else value
        if record.exc_info:
            line["error"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up(log_format: str | None = None) -> None:
    """Log to the terminal; text for people unless told otherwise here or by `RAY_SYNTH_LOG_FORMAT`.

    Raises:
        UserError: there is no such format.
    """
    chosen = log_format or os.environ.get(VARIABLE) or FORMATS[0]
    if chosen not in FORMATS:
        raise UserError(
            f"log format {chosen!r} ({VARIABLE}): it must be one of {', '.join(FORMATS)}"
        )
    global _form  # noqa: PLW0603
    _form = chosen
    logging.captureWarnings(is_json())
    if is_json():  # neither its bars
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    _format(logging.getLogger())


def set_volume(*, quiet: bool = False, verbose: bool = False) -> None:
    """How much is said in the terminal: warnings alone, or also what is else kept in the run's log.

    Raises:
        UserError: both are wanted.
    """
    if quiet and verbose:
        raise UserError("--quiet and --verbose: give one of them")
    global _volume  # noqa: PLW0603
    _volume = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    log.setLevel(min(_volume, logging.INFO))
    _format(logging.getLogger())


def is_quiet() -> bool:
    return _volume > logging.INFO


def is_json() -> bool:
    return _form == "json"


def adopt(name: str) -> None:
    """Where lines are JSON, those of a library with handlers of its own as well."""
    if is_json():
        _format(logging.getLogger(name))


def _format(logger: logging.Logger) -> None:
    for handler in logger.handlers:
        if type(handler).__name__ in ("StreamHandler", "PlainRayHandler"):
            handler.setFormatter(
                JsonFormatter() if is_json() else TextFormatter(getattr(handler, "stream", None))
            )
            if not logger.name.startswith("ray"):
                handler.setLevel(_volume)


@contextmanager
def where(**fields: Any) -> Iterator[None]:
    """Say these of `FIELDS` in every line of the block, in this thread."""
    token = _where.set({**(_where.get() or {}), **fields})
    try:
        yield
    finally:
        _where.reset(token)


def last_file() -> str | None:
    """The file of the run's log that this process wrote last; None where it wrote none."""
    return _last_file


class Gate:
    """Lets a few lines of each kind through, and counts the others."""

    def __init__(self) -> None:
        self._seen: dict[Any, list[float]] = {}  # kind -> start of its minute, let through, held

    def admit(self, kind: Any, now: float) -> int | None:
        """How many of the kind were held back before this one; None where it is held back itself."""
        every = self._window(None, now)
        mine = self._window(kind, now)
        if mine[1] >= MOST_ALIKE or every[1] >= MOST:
            mine[2] += 1
            return None
        mine[1] += 1
        every[1] += 1
        held, mine[2] = int(mine[2]), 0
        return held

    def _window(self, kind: Any, now: float) -> list[float]:
        if len(self._seen) > 1000:  # texts that are never the same twice
            self._seen = {None: self._seen[None]}
        window = self._seen.setdefault(kind, [now, 0, 0])
        if now - window[0] >= WINDOW_S:
            window[0], window[1] = now, 0
        return window


class Forwarder(logging.Handler):
    """In a worker: sends what is said to the board, which the driver reads.

    Args:
        board: the board's handle.
        fields: of `FIELDS`, for every line.
    """

    def __init__(self, board: Any, **fields: Any) -> None:
        super().__init__(logging.DEBUG)
        self.board, self.gate = board, Gate()
        self.fields = {**fields, "worker": f"{socket.gethostname()}:{os.getpid()}"}

    def emit(self, record: logging.LogRecord) -> None:
        held = self.gate.admit((record.levelno, record.msg), time.monotonic())
        if held is None:
            return
        text = record.getMessage() + (f" (and {held:,} more like it)" if held else "")
        said = {field: record.__dict__[field] for field in FIELDS if field in record.__dict__}
        line = {"levelno": record.levelno, "levelname": record.levelname, "created": record.created}
        try:
            self.board.say.remote({**self.fields, **said, **line, "msg": redact(text)})
        except Exception:
            return  # without Ray there is nobody to tell; a log line must end nothing


def forward(board: Any, **fields: Any) -> None:
    """Have all that this worker logs reach the driver; nothing without a board."""
    for handler in [h for h in log.handlers if isinstance(h, Forwarder)]:
        log.removeHandler(handler)
    if board is not None:
        log.addHandler(Forwarder(board, **fields))
        log.setLevel(logging.DEBUG)


def repeat(lines: list[dict[str, Any]]) -> None:
    """In the driver: say what workers said."""
    for line in lines:
        log.handle(logging.makeLogRecord({"name": log.name, **line}))


class RunLog(logging.Handler):
    """A run's lines in its `logs/`, fine ones included; one file per start of the command.

    On a local disk a line is there at once. An object store's files cannot grow: there, lines are
    written by `save`, the newest file whole, and a new one begun when it is large.
    """

    def __init__(self, folder: Folder, **fields: Any) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(JsonFormatter())
        self.folder, self.fields = folder.child("logs"), fields
        self.name_start = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
        self._number, self._bytes, self._saved = 0, bytearray(), 0
        self._file: Any = None
        self._saving = threading.Lock()

    def __enter__(self) -> RunLog:
        if self.folder.is_local:
            os.makedirs(self.folder.path(), exist_ok=True)
            path = self.folder.path(f"{self.name_start}.jsonl")
            self._file = open(path, "a", encoding="utf-8", buffering=1)
        global _last_file  # noqa: PLW0603
        name = f"{self.name_start}.jsonl" if self._file else f"{self.name_start}-000.jsonl"
        _last_file = self.folder.address(name)
        self._level = log.level
        log.setLevel(logging.DEBUG)
        log.addHandler(self)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            said = {"name": log.name, "levelno": logging.ERROR, "levelname": "ERROR"}
            text = f"ended by {type(error).__name__}: {str(error)[:2000]}"
            bug = isinstance(error, Exception) and not isinstance(error, UserError)
            traced = (kind, error, trace) if bug else None
            self.handle(logging.makeLogRecord({**said, "msg": text, "exc_info": traced}))
        log.removeHandler(self)
        log.setLevel(self._level)
        self.save()
        if self._file is not None:
            self._file.close()

    def emit(self, record: logging.LogRecord) -> None:
        for key, value in self.fields.items():
            record.__dict__.setdefault(key, value)
        line = self.format(record) + "\n"
        try:
            if self._file is not None:
                self._file.write(line)
            else:
                self._bytes += line.encode()
        except OSError:  # a full disk: the stages say so themselves
            return

    def save(self) -> None:
        """Write what was said since the last time; a storage that fails is tried again later."""
        with self._saving:
            data = bytes(self._bytes)
            if self._file is not None or len(data) == self._saved:
                return
            try:
                self.folder.write_bytes(f"{self.name_start}-{self._number:03}.jsonl", data)
            except OSError:
                return
            self._saved = len(data)
            if len(data) > PART_BYTES:
                self.acquire()
                try:
                    del self._bytes[: len(data)]
                finally:
                    self.release()
                self._number, self._saved = self._number + 1, 0
