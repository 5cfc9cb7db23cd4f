"""Prompts, how many of each class, and the rounds that they come in (paper, section 3.2)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ray_synth.config.section import Fraction, Place, Positive, Section, result
from ray_synth.errors import UserError

Kind = Literal["plain", "contextual", "stylized"]
MOST_CANDIDATES = 16  # images that are made of one row, to keep one


def _even_mix() -> dict[Kind, float]:
    return {"contextual": 0.5, "stylized": 0.5}


class PracticeGuidanceConfig(Section):
    """The learner's entropy steers the sampler of a diffusers pipeline."""

    scale: Annotated[float, Field(gt=0, le=1)] = result(
        0.1,
        description="how far a guided step shifts the predicted clean latents, as a share of their "
        "own size",
    )
    steps: Annotated[float, Field(gt=0, le=1)] = result(
        0.5,
        description="share of the denoising steps that are guided, spread evenly; never the last",
    )


class PracticeSelectConfig(Section):
    """More images are made than are kept: of each prompt the one that is hardest for the learner."""

    factor: Annotated[int, Field(ge=2, le=MOST_CANDIDATES)] = result(
        4, description="images that are made of each row; one is kept"
    )


class PracticeConfig(Section):
    """Rounds: the model in training says what it does not know, and the next images are for that."""

    rounds: Annotated[int, Field(ge=2)] = result(
        description="the plan is made in so many, training goes on between them"
    )
    first: Annotated[float, Field(gt=0, lt=1)] | None = result(
        None, description="share of all images that round 0 has, alike for all; default: 1 / rounds"
    )
    floor: Fraction = result(
        0.3, description="share of each later round that all classes, kinds and styles get alike"
    )
    by_class: bool = result(True, description="classes that the model is unsure of get more images")
    by_kind: bool = result(
        True,
        description="kinds, styles and scenes that it learns from, and the checks accept, get more",
    )
    apart: Literal["negative_prompt", "words"] | None = result(
        "negative_prompt",
        description="where half of a class's rows say which class it is taken for and is not: in the "
        "negative prompt (read with guidance alone), or in words, `not a heron`; null: nowhere",
    )
    contexts: bool = result(
        False, description="the language model writes new scenes for the weakest classes"
    )
    stop: Annotated[float, Field(gt=0)] | None = result(
        None,
        description="no more images once validation shows, two rounds in a row, that a round gains less "
        "than so many points; default: all rounds are made",
    )

    guidance: PracticeGuidanceConfig | None = result(
        None,
        description="the model steers the sampler of later rounds towards what it is unsure of",
    )
    select: PracticeSelectConfig | None = result(
        None, description="of several images of a row in later rounds, the hardest one is kept"
    )

    @model_validator(mode="after")
    def _can_stop(self) -> PracticeConfig:
        if self.stop is not None and self.rounds < 4:
            raise UserError(
                f"practice.stop compares three rounds before it saves one, and rounds is {self.rounds}: "
                "give at least 4, or leave stop out"
            )
        return self


class PromptingConfig(Section):
    """Prompt diversification and the size of the plan (paper, section 3.2)."""

    multiplier: Annotated[float, Field(gt=0)] = result(
        6.0, description="synthetic images = multiplier x real training images, evenly over classes"
    )
    fill_to: Positive | Literal["even"] | None = result(
        None,
        description="real and synthetic images per class together: classes are filled up to this "
        "number; 'even': what multiplier gives is dealt so that they are as even as can be",
    )
    class_multipliers: dict[str, Annotated[float, Field(ge=0)]] = result(
        default_factory=dict, description="synthetic images of a class = this x its real ones"
    )
    mix: dict[Kind, Annotated[float, Field(ge=0)]] = result(default_factory=_even_mix)
    contexts_per_class: Annotated[int, Field(ge=0)] = result(
        16, description="scenes for contextual and stylized prompts; 0: none are written"
    )
    negative_prompt: str = result("")
    styles: str | None = result(None, description="a YAML file of styles; default: the 60 built in")
    acceptance: Place | None = result(
        None,
        description="the directory of an earlier run: contexts and styles of which more of its images "
        "failed the checks are drawn less",
    )
    practice: PracticeConfig | None = result(
        None, description="rounds, steered by the model in training; default: one plan, fixed"
    )

    @field_validator("mix")
    @classmethod
    def _mix_has_weight(cls, mix: dict[str, float]) -> dict[str, float]:
        if sum(mix.values()) <= 0:
            raise UserError("at least one kind of prompt needs a weight above 0")
        return mix

    @model_validator(mode="after")
    def _one_rule(self) -> PromptingConfig:
        if self.fill_to and self.class_multipliers:
            raise UserError("prompting has fill_to and class_multipliers: give one of them")
        own = "fill_to" if self.fill_to else "class_multipliers" if self.class_multipliers else ""
        if self.practice and own:
            raise UserError(
                f"prompting has practice and {own}, and both say how many images each class gets: give "
                "one of them"
            )
        return self
