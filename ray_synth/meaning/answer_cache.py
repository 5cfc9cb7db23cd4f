"""What a language model answered before, on disk, by model and prompt.

An SQLite file in a folder of one machine; several processes may use it at once.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_synth.errors import UserError
from ray_synth.meaning.few_shot import FewShot


class AnswerCache:
    """Texts by key. A file that cannot be used costs its answers, never a question.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
            # one connection, used under a lock: replicas answer in several threads
            self._db = sqlite3.connect(
                path / "answers.sqlite", timeout=30, check_same_thread=False, isolation_level=None
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"the answer cache {path} cannot be used ({error}): give llm.cache_dir a folder on a "
                "local disk, or leave it out"
            ) from None
        self._lock = threading.Lock()

    def get(self, keys: Sequence[bytes]) -> list[str | None]:
        """The answers kept for these keys; None where there is none."""
        with self._lock:
            try:
                rows = [
                    self._db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
                    for key in keys
                ]
            except sqlite3.Error:
                return [None] * len(keys)
        return [row and row[0] for row in rows]

    def put(self, answers: dict[bytes, str]) -> None:
        """Keep these answers; a full or broken disk is no reason to lose them for the caller."""
        with self._lock:
            try:
                self._db.executemany(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?)", answers.items()
                )
            except sqlite3.Error:
                return


class CachedLLM:
    """A language model that is asked only what it was never asked before.

    Two questions are the same when model, settings, prompt, seed and generation options are.
    """

    def __init__(self, llm: Any, cache: AnswerCache, identity: dict[str, Any]) -> None:
        self.llm, self.cache = llm, cache
        self.identity = identity
        self.hits = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)

    def complete(
        self,
        prompts: Sequence[FewShot],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = ("\n\n",),
    ) -> list[str]:
        """As the model's own."""
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        keys = [
            self._key(prompt, {**options, "seed": seed, "stop": list(stop)})
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        answers = self.cache.get(keys)
        todo = [i for i, answer in enumerate(answers) if answer is None]
        self.hits += len(keys) - len(todo)
        if todo:
            new = self.llm.complete(
                [prompts[i] for i in todo], seeds=[seeds[i] for i in todo], stop=stop, **options
            )
            self.cache.put({keys[i]: text for i, text in zip(todo, new, strict=True) if text})
            for i, text in zip(todo, new, strict=True):
                answers[i] = text
        return [answer or "" for answer in answers]

    def _key(self, prompt: FewShot, options: dict[str, Any]) -> bytes:
        what = [self.identity, prompt.as_text(), options]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).digest()
