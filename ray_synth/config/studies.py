"""What the studies vary."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ray_synth.config.section import Place, Positive, Section, how


class CorruptionConfig(Section):
    """Shifted copies of the test set, for the study of robustness."""

    kinds: list[str] = how(
        ["blur", "brightness", "contrast", "elastic", "jpeg", "noise", "rotate"],
        description="which of evaluation/corruption.py's",
    )
    severities: list[Annotated[int, Field(ge=1, le=5)]] = how([1, 3, 5])
    images: Positive = how(500, description="test images that are shifted, over all classes")


class StudiesConfig(Section):
    """What `ray-synth study` varies; all else is as the config says."""

    seeds: list[Annotated[int, Field(ge=0)]] = how([0, 1, 2], min_length=1)
    more_seeds: dict[str, Positive] = how(
        default_factory=dict,
        description="by study, how many seeds (0, 1, ...) it takes in place of seeds: small effects "
        "need more",
    )
    scale: Annotated[float, Field(gt=0)] = how(
        6.0, description="synthetic images per real one, where the study varies something else"
    )
    scales: list[Annotated[float, Field(gt=0)]] = how([1, 2, 4, 6, 12, 24])
    images_per_class: list[Positive] = how(
        [2, 5, 10, 20], description="real images per class, for the study low_data"
    )
    lambdas: list[Annotated[float, Field(ge=0)]] = how([0.1, 0.25, 0.5, 1.0, 2.0])
    real_fractions: list[Annotated[float, Field(gt=0, lt=1)]] = how([0.2, 0.3333, 0.5, 0.75])
    llms: dict[str, dict[str, Any]] = how(
        default_factory=dict,
        description="names to settings as under meaning.llm; default: the same one, asked otherwise",
    )
    generators: dict[str, dict[str, Any]] = how(
        default_factory=dict,
        description="names to settings as under generation; default: fewer and more steps, guidance",
    )
    pool: Place | None = how(
        None,
        description="a folder of other real images, or of WebDataset tars, that the study rivals "
        "retrieves from",
    )
    corruption: CorruptionConfig = how(CorruptionConfig())
    parallel: Positive | None = how(
        None, description="trainings at a time; default: what the cluster has room for"
    )
