"""Styles are loaded strictly, and put the subject first."""

import pytest

from ray_synth.prompting.contexts import Context
from ray_synth.prompting.styles import Style, load_styles, stylized_prompt


def words(text: str) -> int:
    return 2 + len(text.replace(",", " ,").split())


def test_sixty_styles_are_built_in() -> None:
    styles = load_styles()
    assert len(styles) == 60
    assert len({style.name for style in styles}) == 60
    assert len({style.template for style in styles}) == 60


def test_every_style_keeps_the_subject_before_the_scene() -> None:
    context = Context("beside a cup", "on a table", "at dusk", "close-up")
    for style in load_styles():
        prompt = stylized_prompt(
            style, "crane", "a large bird", context, count_tokens=words, max_tokens=77
        )
        assert "a crane, a large bird" in prompt
        assert prompt.endswith("beside a cup, on a table, at dusk")
        bare = stylized_prompt(style, "crane", "a large bird", count_tokens=words, max_tokens=77)
        assert prompt.startswith(bare)


def test_a_long_scene_is_cut_and_not_the_style() -> None:
    style = Style("oil painting", "an oil painting of {subject}")
    context = Context("beside a very tall stack of old books", "on a table", "at dusk")
    prompt = stylized_prompt(
        style, "crane", "a large bird", context, count_tokens=words, max_tokens=16
    )
    assert prompt == "an oil painting of a crane, a large bird, on a table"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must be a list"),
        ("- {name: a, template: no place}", "exactly once"),
        ("- {name: a, template: '{subject}'}\n- {name: A, template: '{subject}, x'}", "twice"),
        ("- {name: a}", "exactly the keys"),
        ("- {name: '', template: '{subject}'}", "must be a text"),
        ("- [", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "styles.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_styles(path)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no such file: .*gone\.yaml"):
        load_styles(tmp_path / "gone.yaml")
