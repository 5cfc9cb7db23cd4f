"""What the licences of a run's models and data say of outputs and commercial use: no legal advice.

A model's own card says which licence it has (`license`, `license_name` in the head of its README.md);
where it has no card, its id or its family does. `licences.yaml` says in short what the licence says; one
that is not in it is unknown, which is said as well.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ray_synth.config import Config
from ray_synth.errors import UserError
from ray_synth.storage.hub import is_hub_id

LONGEST_CARD = 1 << 20  # bytes that are read of a card
HEAD = re.compile(r"\A\ufeff?\s*---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
TAG = re.compile(r"[A-Za-z0-9 .,+_()'-]{1,80}")  # what may stand in a line of ours
LICENCES = "licences.json"  # of a run directory: what was found when it began
DISCLAIMER = "no legal advice: read the licence itself"


@dataclass(frozen=True)
class Terms:
    """A licence.

    Attributes:
        name: for people.
        outputs, commercial: what it says of them, in short.
        limits: whether it restricts outputs, training on them, or commercial use.
        source: where its text is.
        checked: what of the text was read for this.
    """

    name: str
    outputs: str = "unknown: read the model's card"
    commercial: str = "unknown: read the model's card"
    limits: bool = True
    source: str = ""
    checked: str = "no"


@dataclass(frozen=True)
class Licence:
    """A model's or a data set's licence.

    Attributes:
        role: generator, LLM, CLIP, or training data.
        model: its id, or the last part of its folder.
        by: what said so: its card, its name, or its family; "" where nothing did.
    """

    role: str
    model: str
    terms: Terms
    by: str

    @property
    def line(self) -> str:
        """`generator FLUX.1-dev: FLUX non-commercial (by its card): outputs may not ...`."""
        if not self.by:
            return f"{self.role} {self.model}: licence unknown: read the model's card"
        said = f"{self.role} {self.model}: {self.terms.name} (by {self.by})"
        if self.terms.outputs == Terms.outputs:
            return f"{said}: not in our table: read the model's card"
        return f"{said}: {self.terms.outputs}; commercial use: {self.terms.commercial}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "line": self.line}


@cache
def table() -> tuple[tuple[Terms, frozenset[str], tuple[str, ...]], ...]:
    """All licences that are known, each with tags of cards and patterns of ids."""
    text = (resources.files("ray_synth.generators") / "licences.yaml").read_text("utf-8")
    return tuple(
        (
            Terms(**{key: entry[key] for key in Terms.__dataclass_fields__}),
            frozenset(entry["tags"]),
            tuple(entry["models"]),
        )
        for entry in yaml.safe_load(text)
    )


def licences(config: Config) -> list[Licence]:
    """Of all models that have a part in a run's images, and of training data of a hub.

    Asks the hub for cards that are not in the cache; what is not to be had is left unknown.
    """
    return [licence_of(*model) for model in dict.fromkeys(_models(config))]


def licence_of(
    role: str, model: str, revision: str | None = None, family: str = "", *, ask: bool = True
) -> Licence:
    """The licence of a model.

    Args:
        model: a hub id, a folder, `open_clip:TAG`, or a name on a server.
        family: the licence that most models of its family have.
        ask: look for its card.
    """
    shown = re.split(r"[\\/]", model.rstrip("\\/"))[-1] if Path(model).is_dir() else model
    tag = _tag(_card(role, model, revision)) if ask else ""
    if tag:
        known = (terms for terms, tags, _ in table() if tag.lower() in tags)
        return Licence(role, shown, next(known, Terms(tag)), "its card")
    for terms, _, patterns in table():
        if any(fnmatch.fnmatchcase(model.lower(), pattern.lower()) for pattern in patterns):
            return Licence(role, shown, terms, "its name")
    for terms, _, _ in table():
        if terms.name == family:
            return Licence(role, shown, terms, "its family")
    return Licence(role, shown, Terms("unknown"), "")


def warning(found: list[Licence]) -> str:
    """One line of all licences that restrict something, or are not known; "" where none does."""
    lines = [licence.line for licence in found if licence.terms.limits]
    return f"licences ({DISCLAIMER}): {'; '.join(lines)}" if lines else ""


def _models(config: Config) -> Iterator[tuple[str, str, str | None, str]]:
    """(role, model, revision, licence of its family)."""
    generation, meaning = config.generation, config.meaning
    if generation.generator == "diffusers":
        yield "generator", generation.model, generation.revision, _of_family(config)
    elif generation.model != "embedded":
        yield "generator", generation.model, generation.revision, ""
    writes = set(config.prompting.mix) - {"plain"} and config.prompting.contexts_per_class
    if meaning.enabled or writes:
        yield "LLM", meaning.llm.model, meaning.llm.revision, ""
    if meaning.enabled or generation.checks.need_clip:
        clip = meaning.clip.model
        if clip.startswith("hf-hub:"):
            name, _, revision = clip.removeprefix("hf-hub:").partition("@")
            yield "CLIP", name, revision or None, ""
        elif meaning.clip.pretrained:
            yield "CLIP", f"open_clip:{meaning.clip.pretrained}", None, ""
        else:
            yield "CLIP", clip.removeprefix("local-dir:"), None, ""
    train = config.data.train
    if train.format == "huggingface":
        yield "training data", str(train.path), train.revision, ""


def _of_family(config: Config) -> str:
    if config.generation.model == "embedded":
        return ""
    from ray_synth.generators.settings import family_of

    try:
        return family_of(config.generation).licence
    except UserError:  # which loading it will say better
        return ""


def _card(role: str, model: str, revision: str | None) -> str:
    """The text of a model's README.md; "" where there is none, or it cannot be had."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        path = folder / "README.md"
    elif model != "embedded" and is_hub_id(model):
        from huggingface_hub import hf_hub_download

        kind = "dataset" if role == "training data" else "model"
        try:
            path = Path(hf_hub_download(model, "README.md", revision=revision, repo_type=kind))
        except Exception:  # of the hub, its client, or a proxy: the models themselves say it better
            return ""
    else:
        return ""
    try:
        with path.open("rb") as file:
            return file.read(LONGEST_CARD).decode("utf-8", "replace")
    except OSError:
        return ""


def _tag(card: str) -> str:
    """What a card's head says of the licence: its name, where it is another than the hub lists."""
    head = HEAD.match(card)
    try:
        values = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""
    if not isinstance(values, dict):
        return ""
    found = [values.get(key) for key in ("license", "license_name")]
    texts = [str(text).strip() for text in found if isinstance(text, str)]
    tags = [
        text for text in texts if TAG.fullmatch(text) and text.lower() not in ("other", "unknown")
    ]
    return tags[-1] if tags else ""
