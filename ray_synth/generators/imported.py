"""Images made elsewhere as a generator's: ComfyUI's, a renderer's, a colleague's.

In: plan rows that name one image each (`reference`). Out: that image. So they are checked, kept, trained
on, studied and reported as if they had been generated here, each of them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from ray_synth.config import GenerationConfig, Section, SourceConfig, parse_config
from ray_synth.data.dataset import Index, load_index
from ray_synth.data.images import decode_image
from ray_synth.data.places import read_all
from ray_synth.data.sources import read_rows
from ray_synth.errors import UserError, shortened
from ray_synth.generators.protocol import Failure, Row, digest_settings

if TYPE_CHECKING:
    from PIL import Image


class ImportedSettings(Section):
    """`generation.generator_kwargs` of this generator."""

    source: SourceConfig = Field(description="where the images are, as under data")


class ImportedGenerator:
    """Reads the image that each row names.

    Args:
        config: the generation section; `generator_kwargs: {source: {format, path, class_map}}`.

    Attributes:
        provenance: where the images came from, for their rows.
    """

    def __init__(self, config: GenerationConfig) -> None:
        source = _settings(config).source
        self.index = load_index(source)
        self.provenance = {"library": "imported", "format": source.format, "path": source.path}

    def generate(self, rows: list[Row]) -> Sequence[Image.Image | Failure]:
        """One RGB image for each row, or why it cannot be read.

        Raises:
            UserError: the set is another one than when the plan was made.
        """
        return [_decoded(data) for data in self._read([_place(row) for row in rows])]

    def _read(self, wanted: list[tuple[int, str]]) -> list[bytes]:
        for at, image_id in wanted:
            if at >= len(self.index) or self.index.image_id(at) != image_id:
                raise UserError(
                    f"the imported set has changed since the plan was made: {image_id} is not where "
                    "it was; put it back, or start a run of another name"
                )
        shards = [self.index.shards[self.index.shard[at]] for at, _ in wanted]
        if all(shard.addressable for shard in shards):
            return list(read_all(self.index.locate(at) for at, _ in wanted))
        return [
            data
            for (at, _), shard in zip(wanted, shards, strict=True)
            for _, data in read_rows(shard, [int(self.index.row[at])])
        ]

    @staticmethod
    def check(config: GenerationConfig) -> None:
        """Raises UserError for a wrong setting."""
        _settings(config)

    @staticmethod
    def check_classes(config: GenerationConfig, class_names: Sequence[str]) -> None:
        """Raises UserError where no image of the set is of a class."""
        _classes(config, class_names)

    @staticmethod
    def references(
        config: GenerationConfig, class_names: Sequence[str], seed: int
    ) -> dict[int, list[str]]:
        """What rows of each class index name: all images of the class, in an order by the seed.

        Raises:
            UserError: none of the set's labels is a class.
        """
        index, classes = _classes(config, class_names)
        order = np.random.default_rng(seed).permutation(len(index))
        found: dict[int, list[str]] = {}
        for at in order[classes[order] >= 0].tolist():
            found.setdefault(int(classes[at]), []).append(f"{at}:{index.image_id(at)}")
        return found

    @staticmethod
    def fingerprint(config: GenerationConfig) -> str:
        """Of all that decides the pixels besides the row."""
        source = _settings(config).source
        return digest_settings(["imported", source.path, *config.encoding.values()])


def _classes(config: GenerationConfig, class_names: Sequence[str]) -> tuple[Index, np.ndarray]:
    """The set, and the class index of each of its images, -1 for none. Raises as `references`."""
    index = load_index(_settings(config).source)
    position = {name: at for at, name in enumerate(class_names)}
    classes = np.array([position.get(name, -1) for name in index.class_names])[index.label]
    if (classes < 0).all():
        raise UserError(
            f"the imported images are of {shortened(index.class_names, 5, what='labels')}, none of "
            f"which is a class ({shortened(class_names, 5)}): map them with "
            "generation.generator_kwargs.source.class_map"
        )
    return index, classes


def _place(row: Row) -> tuple[int, str]:
    at, _, image_id = str(row["reference"]).partition(":")
    if not at.isdigit() or not image_id:
        raise UserError(f"row {row['sample_id']} of the plan names no imported image")
    return int(at), image_id


def _decoded(data: bytes) -> Any:
    try:
        return decode_image(data)
    except UserError as error:
        return Failure(f"unreadable: {error}")


def _settings(config: GenerationConfig) -> ImportedSettings:
    if not config.generator_kwargs.get("source"):
        raise UserError(
            "generator 'imported' needs generation.generator_kwargs.source, such as "
            "{format: imagefolder, path: made/elsewhere}"
        )
    return parse_config(
        config.generator_kwargs, origin="generation.generator_kwargs", model=ImportedSettings
    )
