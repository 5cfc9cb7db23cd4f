"""Prompts of long names, and of scripts without spaces, fit what the text encoder really reads."""

from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_synth.config import GenerationConfig
from ray_synth.generators.registry import prompt_tokens
from ray_synth.prompting.contexts import Context, contextual_prompt, plain_prompt
from ray_synth.prompting.fitting import longest
from ray_synth.prompting.styles import load_styles, stylized_prompt

SCENE = Context("next to a cup", "on a wooden table in a library", "in soft light", "close-up")
NAMES = [
    "crane",
    "シベリアンハスキー犬の成犬（オス）",
    "一種在北半球溫帶森林中生活的大型食肉哺乳動物以及牠們的近親和其他相似的物種",
    "หมาป่าสีเทาขนาดใหญ่ที่อาศัยอยู่ในป่า",
    "Überlandleitungsmastfundamentverankerungsschraubenmutter" * 3,
    "a very long name " * 30,
    "N-(4-hydroxyphenyl)ethanamide_form_II_" * 6,
    "🦩" * 60,
    "x" * 100_000,
    "ग्रेट इंडियन बस्टर्ड पक्षी" * 4,
]


@cache
def embedded():
    """The embedded generator's own tokenizer, and how much its text encoder reads."""
    return prompt_tokens(GenerationConfig())


def limit(lost=None):
    count, most = embedded()
    return {"count_tokens": count, "max_tokens": most, "lost": lost}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12])
@pytest.mark.parametrize(
    "meaning", ["", "a large wading bird", "大型の鳥で、湿地や川の近くに住む" * 6]
)
def test_any_name_fits_and_its_beginning_stays(name, meaning):
    count, most = embedded()
    styles = load_styles()
    prompts = [
        plain_prompt(name, meaning, **limit()),
        contextual_prompt(name, meaning, SCENE, **limit()),
    ]
    prompts += [stylized_prompt(style, name, meaning, SCENE, **limit()) for style in styles[:10]]
    for prompt in prompts:
        assert count(prompt) <= most
        # as much as the encoder reads is used: a name that is cut leaves little room
        assert name[:4].replace("_", " ") in prompt


def test_what_matters_least_goes_first_and_is_counted():
    lost = Counter()
    whole = contextual_prompt("crane", "a large bird", SCENE, **limit(lost))
    assert whole.endswith("close-up")
    assert not lost
    meaning = "a bird that wades in shallow water and looks for fish and frogs " * 3
    scene = contextual_prompt("crane", meaning, SCENE, **limit(lost))
    assert "fish and frogs" in scene
    assert not scene.endswith("close-up")
    assert lost == {"scene": 1}
    cut = contextual_prompt("crane", meaning * 3, SCENE, **limit(lost))
    assert cut.startswith("a photo of a crane, a bird that wades in shallow water")
    assert lost == {"scene": 1, "meaning": 1}
    plain_prompt("crane " * 200, "a bird", **limit(lost))
    assert lost == {"scene": 1, "meaning": 1, "name": 1}


def test_japanese_is_cut_between_characters_and_not_dropped_whole():
    count, most = embedded()
    meaning = "大型の鳥で湿地や川の近くに住み魚や蛙を食べる" * 5
    prompt = plain_prompt("鶴", meaning, **limit())
    kept = prompt.partition(", ")[2]
    assert meaning.startswith(kept)
    assert most - count(prompt) <= 4  # a character is up to three tokens


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.integers(0, 60))
def test_the_longest_beginning_that_fits(text, most):
    found = longest(text, lambda part: len(part) <= most)
    assert text.startswith(found)
    assert len(found) <= most
