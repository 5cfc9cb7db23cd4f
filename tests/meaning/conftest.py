"""One embedded language model for all tests of meanings: it takes seconds to load."""

import pytest

from ray_synth.meaning.transformers_llm import TransformersLLM


@pytest.fixture(scope="session")
def embedded_llm() -> TransformersLLM:
    return TransformersLLM("embedded")
