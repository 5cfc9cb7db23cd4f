"""The parts of a drill: nodes that go and come, training that keeps pace, callers of the service."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from fake_cluster import OBJECT_STORE, wait_for
from service import DIGITS, digit_images

from ray_synth.service.client import Client, ServiceError, ServiceUnavailable
from ray_synth.service.session import ask_all

NUMBERS = [f"the number {name}" for name in DIGITS]
ROLES = (
    "RayTrainWorker",
    "ImageMaker",
    "ServeReplica:drill:CLIP",
    "ServeReplica:drill:LLM",
    "ServeReplica:drill:Disambiguation",
)
Scores = tuple[str, dict[str, float]]  # the choice, and each meaning's score
PATIENCE_S = 300  # for anything that a healthy cluster does in seconds


class Pace:
    """In the place of a progress board: notes when each step was done, and holds training back.

    A step waits until the number in `folder/limit` is above it, or the file `folder/enough` is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.put = folder, self

    def remote(self, name: str, step: int) -> None:
        line = json.dumps([step, os.getpid()]) + "\n"
        with open(self.folder / "steps", "ab", buffering=0) as file:
            file.write(line.encode())
        while not (self.folder / "enough").exists():
            if step < int((self.folder / "limit").read_text()):
                break
            time.sleep(0.1)

    def allow(self, more: int) -> None:
        """Let training make so many more steps."""
        steps = self.steps()
        temporary = self.folder / "limit.tmp"
        temporary.write_text(str((steps[-1][0] if steps else 0) + more))
        temporary.rename(self.folder / "limit")

    def steps(self) -> list[tuple[int, int]]:
        """Every step done so far, those done again included, and the process of rank 0 that did it."""
        log = self.folder / "steps"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(step, process) for step, process in map(json.loads, lines)]

    def summary(self) -> dict[str, int]:
        """How often training was started again, and how many steps it did again."""
        steps = self.steps()
        return {
            "restarts": len({process for _, process in steps}) - 1,
            "steps_again": len(steps) - len({step for step, _ in steps}),
        }


class Callers:
    """Two threads that ask the service at a steady trickle: over HTTP, and as the pipeline does.

    A question over HTTP that meets an error is counted by the error's kind and asked again; the
    pipeline's way asks again by itself.
    """

    def __init__(self, url: str, handle: Any, pause_s: float) -> None:
        self.client, self.handle = Client(url, retries=0), handle
        self.pause_s = pause_s
        self.asked = self.right = 0
        self.errors: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest_s = 0.0
        self.lock, self.stop = threading.Lock(), threading.Event()
        images = [{"images": digit_images(name, 2)} for name in DIGITS[:3]]  # asks CLIP alone
        context = {"images": [], "context": "from a list of numbers"}  # asks the language model
        self.questions = [
            {"class_name": name, "meanings": NUMBERS, "num_meanings": 0, **given}
            for name, given in zip(DIGITS[:4], [*images, context], strict=True)
        ]
        self.truth = [self._over_http(question) for question in self.questions]  # undisturbed
        ways = (self._until_answered, self._through_handle)
        self.threads = [threading.Thread(target=self._run, args=(way,)) for way in ways]

    def __enter__(self) -> Callers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(3 * PATIENCE_S)

    def summary(self) -> dict[str, Any]:
        names = ("asked", "right", "errors", "wrong", "slowest_s")
        return {name: getattr(self, name) for name in names}

    def _run(self, way: Callable[[dict[str, Any]], Any]) -> None:
        while not self.stop.wait(self.pause_s):
            with self.lock:
                self.asked += 1
                number = self.asked % 3 if self.asked % 16 else 3  # the language model is slow
            started = time.monotonic()
            try:
                answer = way(self.questions[number])
            except Exception as error:
                answer = repr(error)
            with self.lock:
                self.slowest_s = max(self.slowest_s, time.monotonic() - started)
                if alike(answer, self.truth[number]):
                    self.right += 1
                else:
                    self.wrong.append(f"{answer}, not {self.truth[number]}")

    def _over_http(self, question: dict[str, Any]) -> Scores:
        answer = self.client.disambiguate(**question)
        return answer.choice, {c.meaning: c.score for c in answer.candidates}

    def _through_handle(self, question: dict[str, Any]) -> Scores:
        ((_, entry),) = ask_all([question], lambda asked: self.handle.resolve.remote(**asked))
        return entry["choice"], {c["meaning"]: c["score"] for c in entry["candidates"]}

    def _until_answered(self, question: dict[str, Any]) -> Scores:
        deadline = time.monotonic() + 3 * PATIENCE_S
        while True:
            try:
                return self._over_http(question)
            except (ServiceError, ServiceUnavailable) as error:
                with self.lock:
                    self.errors[kind(error)] += 1
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def alike(one: Any, other: Scores) -> bool:
    """Equal but for the rounding of batches of another size."""
    if isinstance(one, str) or (one[0], one[1].keys()) != (other[0], other[1].keys()):
        return False
    return all(abs(one[1][meaning] - score) < 1e-3 for meaning, score in other[1].items())


def kind(error: ServiceError | ServiceUnavailable) -> str:
    """`503 a model is being started again ...`, or the name of what broke."""
    if isinstance(error, ServiceError):
        return f"{error.problem.status} {error.problem.detail[:80]}"
    return type(error.__cause__).__name__


class Nodes:
    """Worker nodes of one fake GPU each."""

    def __init__(self, cluster: Any, count: int) -> None:
        self.cluster = cluster
        for _ in range(count):
            self.add()

    def add(self) -> Any:
        return start_node(self.cluster, num_cpus=3, num_gpus=1)

    def alive(self) -> int:
        import ray

        return sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes())

    def holding(self, what: str) -> Counter[str]:
        """How many live actors, whose class's name holds a text, are on each node (its id)."""
        import ray._private.state

        found = ray._private.state.actors(actor_state_name="ALIVE").values()
        return Counter(a["Address"]["NodeID"] for a in found if what in a["ActorClassName"])

    def held_by(self, node: Any) -> dict[str, int]:
        """How many of each kind of our actors a node holds."""
        return {what: self.holding(what)[node.node_id] for what in ROLES}

    def choose(self, what: str) -> Any:
        """A node that holds this; rather one without training, which takes longest to come back."""
        hit, training = self.holding(what), self.holding("RayTrainWorker")
        ours = [node for node in self.cluster.worker_nodes if hit[node.node_id]]
        return min(ours, key=lambda node: training[node.node_id], default=None)

    def kill(self, node: Any) -> None:
        """End a node as a lost machine ends: its raylet and all of its workers at once, by SIGKILL."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)


def start_node(cluster: Any, **settings: Any) -> Any:
    """Add a node. Ray gives one 30 s to start, less than it takes on a busy machine: tried again."""
    for last in (False, False, True):
        before = set(psutil.Process().children())
        try:
            return cluster.add_node(object_store_memory=OBJECT_STORE, **settings)
        except Exception as error:
            if last or "timed out during startup" not in str(error):
                raise
            for process in set(psutil.Process().children()) - before:
                process.kill()


def require(condition: Any, what: str, seconds: float = PATIENCE_S) -> None:
    assert wait_for(condition, seconds, every_s=0.5), f"not in {seconds} s: {what}"
