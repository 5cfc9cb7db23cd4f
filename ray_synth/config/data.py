"""Real images, and the run whose classes and images are kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from ray_synth.config.section import Finite, Place, Positive, Section, at_home, how, result
from ray_synth.errors import UserError

IN_DOMAIN = "in_domain"  # what `data.test` is called among the test sets
TAKEN = (IN_DOMAIN, "training", "validation")  # names of sets that no `data.ood` may have


def _black_then_white(given: tuple[float, float]) -> tuple[float, float]:
    if given[0] == given[1]:
        raise UserError(f"value_range: black and white are both {given[0]:g}")
    return given


class SourceConfig(Section):
    """Where a set of labelled images is read from."""

    format: Literal[
        "digits", "uci_digits", "imagefolder", "parquet", "webdataset", "huggingface"
    ] = result()
    path: Place | None = result(None, description="folder, URI, glob, or Hugging Face dataset id")
    image_list: Place | None = result(
        None,
        description="imagefolder: a text file with a line `path label` for each image, paths below "
        "`path`; default: all images, by their folders",
    )
    split: str | None = result(None, description="split name (huggingface) or train|test (digits)")
    revision: str | None = result(None, description="revision of a Hugging Face dataset")
    image_column: str = result("image")
    label_column: str = result("label")
    images_per_class: Positive | dict[str, Positive] | None = result(
        None, description="take at most this many per class; or a number for each class name"
    )
    class_map: Literal["imagenet_wnids", "imagenet_indices"] | dict[str, str] | None = result(
        None,
        description="label in this source -> class name; labels left out are ignored. Or how "
        "ImageNet's folders are named",
    )
    value_range: Annotated[tuple[Finite, Finite], AfterValidator(_black_then_white)] | None = (
        result(
            None,
            description="[BLACK, WHITE]: values of grey pixels that are shown so, [0, 4095] for 12 bits "
            "kept in 16; default: 16 bits by their type, floats from 0 to 1",
        )
    )
    follow_links: bool = result(
        False, description="imagefolder: read pictures that are links to outside of `path`"
    )

    @model_validator(mode="after")
    def _needs_a_path(self) -> SourceConfig:
        if self.format not in ("digits", "uci_digits") and not self.path:
            raise UserError(f"a source of format {self.format} needs a path")
        if self.image_list and self.format != "imagefolder":
            raise UserError("image_list belongs to format: imagefolder")
        return self


class ClassInfo(Section):
    """What the user knows of a class's name."""

    synonyms: list[str] = result(default_factory=list, description="other names of the class")
    parent: str | None = result(None, description="what it is a kind of: bird")


class DataConfig(Section):
    """The real images: training set, in-domain test, out-of-domain tests."""

    train: SourceConfig = result()
    test: SourceConfig = result()
    ood: dict[str, SourceConfig] = result(default_factory=dict)
    validation: Positive | None = result(
        None, description="training images per class that are held out, to choose settings by"
    )
    class_names: list[str] | str | None = result(
        None,
        description="names, 'imagenet', or a text file with one per line; default: the labels "
        "themselves",
    )
    class_info: dict[str, ClassInfo] | Place | None = result(
        None,
        description="{synonyms: [...], parent: ...} by class name, or a YAML or CSV file of them: "
        "candidates and a context for the meanings",
    )
    max_pixels: Positive = result(50_000_000, description="larger images are set aside")
    max_corrupt: Annotated[float, Field(ge=0, le=1)] = how(
        0.25,
        description="share of a set's images: where more cannot be used, a run does not begin",
    )

    @field_validator("class_names")
    @classmethod
    def _names_at_home(cls, value: Any) -> Any:
        return at_home(value)

    @field_validator("ood")
    @classmethod
    def _names_of_their_own(cls, ood: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        for name in ood:
            if name in TAKEN or not name.strip():
                raise UserError(
                    f"a test set cannot be called {name!r}: "
                    + ("that is the name of another set; " if name.strip() else "")
                    + "give it another name"
                )
        return ood


class TakeOverConfig(Section):
    """A finished run whose meanings, scenes and images are kept, where its classes are this run's."""

    run: Place = result(description="its directory: runs/birds")
    renamed: dict[str, str] = result(
        default_factory=dict, description="its name of a class -> the name now"
    )
    split: dict[str, list[str]] = result(
        default_factory=dict, description="its class -> the classes it became, which begin anew"
    )
