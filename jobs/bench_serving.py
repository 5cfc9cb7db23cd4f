"""The verb `serving` of `jobs/bench.py`: the service over HTTP against its models called in process."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import numpy as np

from ray_synth.config import ClipConfig, ClusterConfig, LlmConfig, SourceConfig
from ray_synth.data.digits import CLASS_NAMES as DIGITS

IMAGES = 8  # a question
MEANINGS = 1  # from the LLM: three answers, and again where they are no good
Question = dict[str, Any]


def serving(
    concurrency: Sequence[int], *, rounds: int, questions: int, llm: bool
) -> dict[str, Any]:
    """Latency and throughput at each concurrency, and the same questions answered in process.

    Every question has a seed, images and phrases of its own, so that no cache answers it. In process, all
    questions are in work at once and the models get full batches: what the machine can do.

    Args:
        concurrency: questions in flight; the last one counts as saturation.
        rounds: of the last one against in process, taken in turn.
        questions: in a round.
        llm: ask the LLM for meanings; else the caller's are ranked, which is CLIP's work alone.
    """
    fresh = _questions(llm)
    models = _InProcess()
    found: dict[int, dict[str, float]] = {}
    latencies: list[float] = []  # at saturation, of all rounds
    served, alone = [], []  # seconds of each round
    with _service() as address:
        asyncio.run(_ask_all(address, _take(fresh, 4), 4))  # warm up
        asyncio.run(models.answer_all(_take(fresh, 4)))
        for level in concurrency[:-1]:
            some = _take(fresh, min(questions, 2 * level))
            found[level] = _figures(*asyncio.run(_ask_all(address, some, level)))
        before = _batches(address)
        for _ in range(rounds):
            some = _take(fresh, questions)
            each, seconds = asyncio.run(_ask_all(address, some, concurrency[-1]))
            latencies += each
            served.append(seconds)
            started = time.perf_counter()
            asyncio.run(models.answer_all(some))
            alone.append(time.perf_counter() - started)
        after = _batches(address)
    found[concurrency[-1]] = _figures(latencies, sum(served))
    what = "a meaning from the LLM" if llm else "the caller's meanings alone"
    print(f"/disambiguate, {IMAGES} handwritten digits per question, {what}")
    print("concurrency  questions/s   p50 ms   p95 ms   p99 ms")
    for level, row in found.items():
        print(
            f"{level:11d} {row['per_second']:12.2f} {row['p50_ms']:8.0f} {row['p95_ms']:8.0f} "
            f"{row['p99_ms']:8.0f}"
        )
    ratio = statistics.median(b / a for a, b in zip(served, alone, strict=True))
    in_process = statistics.median(questions / seconds for seconds in alone)
    batch = _mean_batch(before, after, "llm" if llm else "clip")
    print(
        f"in process, in batches: {in_process:.2f} questions/s; served "
        f"{ratio:.3f} of it (median of {rounds} rounds, taken in turn); mean batch {batch:.1f}"
    )
    return {
        "served_over_in_process": round(ratio, 4),
        "mean_batch_size": round(batch, 2),
        "p95_ms": round(found[concurrency[-1]]["p95_ms"], 1),
        "levels": {str(level): row for level, row in found.items()},
        "in_process_per_second": round(in_process, 3),
    }


@contextmanager
def _service() -> Iterator[str]:
    """The service with its default models on a Ray of its own; its address."""
    from ray import serve

    from ray_synth.cluster.connection import connect
    from ray_synth.service.app import ServeConfig, build
    from ray_synth.service.limits import Limits

    port = _free_port()
    app = ServeConfig(
        llm=LlmConfig(num_cpus=0.5),
        clip=ClipConfig(num_cpus=0.5),
        limits=Limits(timeout_s=600),  # 128 at once wait minutes for a small machine's LLM
    )
    with connect(ClusterConfig(num_cpus=4)):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(app), name="bench", route_prefix="/")
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


class _InProcess:
    """The service's own models and logic, without the service."""

    def __init__(self) -> None:
        from ray_synth.meaning.backends import load_llm
        from ray_synth.meaning.background import shipped_background
        from ray_synth.meaning.clip import ClipModel

        threads = os.cpu_count()
        self.llm = load_llm(LlmConfig(), num_threads=threads)
        self.clip = ClipModel(num_threads=threads)
        self.background = shipped_background(self.clip)

    async def answer_all(self, questions: list[Question]) -> None:
        from ray_synth.data.images import decode_image
        from ray_synth.meaning.ambiguity import Models, resolve_meaning

        pictures = [
            decode_image(base64.b64decode(image)) for q in questions for image in q["images"]
        ]
        features = self.clip.encode_images(pictures).reshape(len(questions), IMAGES, -1)
        waiting: list[tuple[Any, int, dict[str, Any], asyncio.Future[str]]] = []
        unread: list[tuple[list[str], asyncio.Future[np.ndarray]]] = []

        async def complete(prompt: Any, seed: int, **options: Any) -> str:
            future = asyncio.get_running_loop().create_future()
            waiting.append((prompt, seed, options, future))
            return await future

        async def embed(texts: list[str]) -> np.ndarray:
            future = asyncio.get_running_loop().create_future()
            unread.append((texts, future))
            return await future

        models = Models(complete, embed)
        tasks = [
            asyncio.ensure_future(
                resolve_meaning(
                    q["class_name"],
                    image_features=rows,
                    models=models,
                    num_meanings=q["num_meanings"],
                    meanings=q.get("meanings"),
                    seed=q["seed"],
                    background=self.background,
                    merge_at=self.clip.merge_similarity,
                )
            )
            for q, rows in zip(questions, features, strict=True)
        ]
        while not all(task.done() for task in tasks):
            for _ in range(5):  # until every question has come to where it waits for a model
                await asyncio.sleep(0)
            if unread:
                rows = iter(self.clip.encode_texts([text for texts, _ in unread for text in texts]))
                for texts, reply in unread:
                    reply.set_result(np.stack([next(rows) for _ in texts]))
                unread.clear()
                continue
            batch = waiting[: self.llm.max_batch_size]  # type: ignore[attr-defined]
            del waiting[: len(batch)]
            if batch:
                answers = self.llm.complete(
                    [item[0] for item in batch], seeds=[item[1] for item in batch], **batch[0][2]
                )
                for (*_, future), answer in zip(batch, answers, strict=True):
                    future.set_result(answer)
        await asyncio.gather(*tasks)


async def _ask_all(
    address: str, questions: list[Question], concurrency: int
) -> tuple[list[float], float]:
    """Every question answered, so many at a time: each one's seconds, and the seconds in all."""
    import httpx

    gate = asyncio.Semaphore(concurrency)
    latencies = []
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:

        async def ask(question: Question) -> None:
            async with gate:
                started = time.perf_counter()
                response = await client.post("/disambiguate", json=question)
                response.raise_for_status()
                latencies.append(time.perf_counter() - started)

        started = time.perf_counter()
        await asyncio.gather(*(ask(question) for question in questions))
        return latencies, time.perf_counter() - started


def _figures(latencies: list[float], seconds: float) -> dict[str, float]:
    p50, p95, p99 = (1000 * np.percentile(latencies, q) for q in (50, 95, 99))
    rate = len(latencies) / seconds
    return {
        "per_second": round(rate, 3),
        "p50_ms": round(float(p50), 1),
        "p95_ms": round(float(p95), 1),
        "p99_ms": round(float(p99), 1),
    }


def _batches(address: str) -> dict[str, Any]:
    import httpx

    return httpx.get(f"{address}/models", timeout=60).raise_for_status().json()


def _mean_batch(before: dict[str, Any], after: dict[str, Any], model: str) -> float:
    """Questions (LLM) or images (CLIP) per batch, between two readings."""
    first, last = before[model], after[model]
    batches = last["batches"] - first["batches"]
    return (last["items"] - first["items"]) / max(batches, 1)


def _digits() -> list[list[bytes]]:
    from ray_synth.data.dataset import ImagesByClass, load_index, select

    index = select(load_index(SourceConfig(format="digits", split="test"), DIGITS), 100, seed=0)
    return [images for _, images in sorted(ImagesByClass(index).items())]


def _question(
    digits: list[list[bytes]], rng: np.random.Generator, number: int, llm: bool
) -> Question:
    """A digit's name and some of its images, each with a byte of its own behind its end."""
    label = number % 10
    chosen = rng.choice(len(digits[label]), IMAGES, replace=False)
    images = [digits[label][i] + number.to_bytes(4, "big") for i in chosen]
    question: Question = {
        "class_name": DIGITS[label],
        "images": [base64.b64encode(image).decode() for image in images],
        "num_meanings": MEANINGS if llm else 0,
        "seed": number,
    }
    if not llm:
        question["meanings"] = [f"the number {name}, number {number}" for name in DIGITS]
    return question


def _questions(llm: bool) -> Iterator[Question]:
    """No end of questions, none like another."""
    digits, rng = _digits(), np.random.default_rng(0)
    return (_question(digits, rng, number, llm) for number in count())


def _take(questions: Iterator[Question], number: int) -> list[Question]:
    return list(islice(questions, number))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
