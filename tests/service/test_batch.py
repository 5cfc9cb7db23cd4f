"""A class list of the service: memory, answers and how much is asked at once, without its models."""

import asyncio
import tracemalloc

import numpy as np
import pytest

from ray_synth.config import LlmConfig
from ray_synth.meaning.candidates import siblings_context
from ray_synth.service.batch import Seen, answer_lines, classes_at_once
from ray_synth.service.messages import BatchBody, Line
from ray_synth.service.resolver import Resolver, ServeConfig

DIM = 64


def unit_rows(rng, *shape):
    rows = rng.normal(size=(*shape, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_what_is_kept_of_the_others_is_what_their_rows_say():
    rng = np.random.default_rng(0)
    seen = Seen()
    rows = {f"class {i}": unit_rows(rng, 1 + i % 7) for i in range(30)}
    for name, own in rows.items():
        seen.add(name, own)
    seen.add("without", None)
    texts = unit_rows(rng, 6)
    for name in ("class 0", "class 13", "class 29"):
        others = np.concatenate([own for other, own in rows.items() if other != name])
        means, spreads = seen.others(name).of_texts(texts)
        assert np.allclose(means, (others @ texts.T).mean(axis=0), atol=1e-6)
        assert np.allclose(spreads, (others @ texts.T).std(axis=0), atol=1e-6)
    assert seen.others("without").count == sum(map(len, rows.values()))
    alone = Seen()
    alone.add("a", unit_rows(rng, 3))
    assert alone.others("a").count == 0


class InProcess(Resolver):
    """The service's own resolver with stand-ins for the replicas that it asks: images are numbers."""

    def __init__(self) -> None:
        self.config = ServeConfig()
        self.senses, self.metrics, self.clip_facts = None, _NoMetrics(), FACTS
        self.shipped = None

    async def embed_images(self, images):
        await asyncio.sleep(0)
        return unit_rows(np.random.default_rng(len(images)), len(images)) if images else None

    async def embed_texts(self, texts):
        return unit_rows(np.random.default_rng(len(texts)), len(texts))


FACTS = {"temperature": 0.01, "merge_at": 0.98}


class _NoMetrics:
    def timed(self, _):
        import contextlib

        return contextlib.nullcontext()

    def resolved(self, _):
        pass

    def log_failure(self, error):
        raise error


def test_a_list_of_hundreds_of_classes_takes_no_more_than_its_own_features():
    """Before, each waiting class held the rows of all others: 300 times what they are together."""
    count, images = 300, 32
    body = BatchBody.model_validate(
        {
            "classes": [
                {"class_name": f"class {i}", "images": ["aGk="] * images, "meanings": ["a thing"]}
                for i in range(count)
            ],
            "num_meanings": 0,
        }
    )

    async def run():
        return [line async for line in answer_lines(body, InProcess()) if line.strip()]

    tracemalloc.start()
    lines = asyncio.run(run())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(Line.model_validate_json(line).answer for line in lines)
    assert len(lines) == count
    own = count * images * DIM * 4
    assert peak < 4 * own + 20e6, f"{peak / own:.0f} times its features"


@pytest.mark.parametrize(
    ("llm", "num_meanings", "most"),
    [
        ({}, 0, 32),
        ({"max_batch_size": 16}, 5, 2),
        ({"max_batch_size": 16}, 1, 10),
        ({"max_batch_size": 32, "replicas": (1, 6)}, 5, 25),
        ({"max_batch_size": 256, "replicas": 4}, 5, 32),
    ],
)
def test_no_more_classes_are_asked_about_than_keep_the_models_busy(llm, num_meanings, most):
    config = ServeConfig(llm=LlmConfig.model_validate(llm))
    assert classes_at_once(config, num_meanings) == most


def test_siblings_of_a_long_list_are_the_first_few():
    names = [f"class_{i}" for i in range(1000)]
    said = siblings_context("class_0", names)
    assert said == "from a list with " + ", ".join(f"class {i}" for i in range(1, 9))
