"""One image of a run made again, alone, from its row: the proof that its provenance is whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from pydantic import ValidationError

from ray_synth.config import MOST_CANDIDATES, GenerationConfig, load_run_config
from ray_synth.data.images import decode_image, encode_image
from ray_synth.device import pick_device
from ray_synth.errors import UserError
from ray_synth.generation.batch_size import LARGEST
from ray_synth.generation.maker import NEW_SEEDS, attempt_seed, read_references
from ray_synth.generation.store import ImageStore
from ray_synth.generators.learner import guided_by, steer
from ray_synth.generators.protocol import Row, generate_all
from ray_synth.generators.registry import check_guidance, fingerprint, generator_class
from ray_synth.prompting.plan_file import MOST_CLASSES, MOST_SEED, SAMPLE_ID
from ray_synth.storage.folder import Folder

# What an image's row knows better than the run's config: the config may leave it open.
FROM_ROW = ("dtype", "batch_size", "compile", "num_threads")
MOST_THREADS = 1024
LONGEST_TEXT = 100_000  # characters of a prompt


@dataclass(frozen=True)
class Regenerated:
    """An image made again.

    Attributes:
        row: the stored row.
        image: the new encoded bytes.
        different: how many of the pixels' values differ, and by how much at most (0..255).
        elsewhere: what differs between the place where it was made and this one.
    """

    row: Row
    image: bytes
    suffix: str
    different: int
    largest: int
    elsewhere: list[str]

    @property
    def identical(self) -> bool:
        return self.different == 0

    def as_dict(self) -> dict[str, Any]:
        """For programs: all that `describe` says."""
        said = {key: self.row[key] for key in ("sample_id", "prompt", "seed", "attempt")}
        return {
            **said,
            "identical": self.identical,
            "different_values": self.different,
            "largest_difference": self.largest,
            "made_elsewhere": self.elsewhere,
        }

    def describe(self) -> str:
        row = self.row
        lines = [
            f"{row['sample_id']}: {row['prompt']!r}, seed {row['seed']}, attempt {row['attempt']}"
        ]
        if self.identical:
            lines.append("the same pixels as in the store")
        else:
            lines.append(
                f"{self.different:,} pixel values differ from the store's, by {self.largest} at most"
            )
        lines += [f"made elsewhere: {change}" for change in self.elsewhere]
        return "\n".join(lines)


def regenerate(run: Folder, sample_id: str) -> Regenerated:
    """Make an image of a run again.

    Args:
        sample_id: its id, or the start of it.

    Raises:
        UserError: no run there, no such image (or several), or another model by the same name.
    """
    config = load_run_config(run)
    row = find_row(ImageStore(run.child("images")), sample_id)
    facts = read_facts(row)
    if not row["image"]:
        raise UserError(f"{row['sample_id']} was never an image: {row['reject_reason']}")
    steering = guided_by(run, facts, row["sample_id"])
    if steering is not None:
        check_guidance(config.generation)
    made_by = fingerprint(config.generation)
    if facts["fingerprint"] != (steering.fingerprint(made_by) if steering else made_by):
        raise UserError(
            f"{row['sample_id']} was made by a {facts['model']!r} with other weights or settings than "
            f"{config.generation.model!r} has now"
        )
    generator = generator_class(config.generation.generator)(as_made(config.generation, facts))
    if steering is not None:
        steer(generator, steering, pick_device(config.generation.device))
    inputs = {**row, "seed": attempt_seed(row["seed"], row["attempt"])}
    if row["reference"] and not hasattr(generator, "references"):  # imported images name themselves
        references = read_references(run)
        if row["reference"] not in references:
            raise UserError(f"{row['sample_id']}: the run keeps no image {row['reference']!r}")
        inputs["reference_image"] = references[row["reference"]]
    image, reason = generate_all(generator, [inputs])[0]
    if image is None:
        raise UserError(f"{row['sample_id']} could not be made again: {reason}")
    encoding = config.generation.encoding
    data = encode_image(image, **encoding)
    before, after = (np.asarray(decode_image(item)).astype(int) for item in (row["image"], data))
    gap = np.abs(before - after) if before.shape == after.shape else np.full(after.shape, 255)
    now = getattr(generator, "provenance", {})
    return Regenerated(
        row,
        data,
        encoding["image_format"],
        different=int((gap > 0).sum()),
        largest=int(gap.max()),
        elsewhere=[
            f"{key} {facts[key]}, here {now[key]}"
            for key in ("device", "torch", "dtype", "num_threads")
            if key in facts and facts[key] != now.get(key)
        ],
    )


def read_facts(row: Row) -> dict[str, Any]:
    """What the `generator` column of a stored row says of how it was made.

    Raises:
        UserError: a row whose values no run writes; names the row and the value.
    """
    bounds = {
        "seed": MOST_SEED,
        "class_index": MOST_CLASSES,
        "attempt": MOST_CANDIDATES + NEW_SEEDS,
    }
    try:
        if not SAMPLE_ID.fullmatch(row["sample_id"]):
            raise ValueError("a sample_id that cannot name a file")
        for name, most in bounds.items():
            if not isinstance(row[name], int) or not 0 <= row[name] < most:
                raise ValueError(f"{name} {row[name]!r}")
        for name in ("prompt", "class_name"):
            if not isinstance(row[name], str) or len(row[name]) > LONGEST_TEXT:
                raise ValueError(f"no {name}, or one longer than {LONGEST_TEXT} characters")
        facts = json.loads(row["generator"])
        if not isinstance(facts, dict) or not {"fingerprint", "model"} <= facts.keys():
            raise ValueError("a generator without its fingerprint and model")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the stored row {row['sample_id']!r:.80} is not as a run writes it ({error}): it cannot be "
            "made again"
        ) from None
    return facts


def as_made(config: GenerationConfig, facts: dict[str, Any]) -> GenerationConfig:
    """The generation section with all that it left open as the row says it was.

    A row is input like any other: what it asks for must be a setting's value, and be bounded.

    Raises:
        UserError: it is not.
    """
    known = {key: facts[key] for key in FROM_ROW if facts.get(key) is not None}
    batch = config.batch_size if isinstance(config.batch_size, int) else LARGEST
    for key, most in (("batch_size", max(batch, LARGEST)), ("num_threads", MOST_THREADS)):
        value = known.get(key, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(
                f"the stored row asks for {key} {value!r:.80}: 1 to {most} can be taken"
            )
    try:
        return GenerationConfig.model_validate({**config.model_dump(), **known})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"the stored row has no setting of a run: {where}: {first['msg']}"
        ) from None


def find_row(store: ImageStore, sample_id: str) -> Row:
    """The stored row of an id, or of the start of one that no other id has."""
    found = []
    for name, table in store.every(["sample_id"]):
        ids = table["sample_id"].filter(pc.starts_with(table["sample_id"], sample_id)).to_pylist()
        for rows in store.groups(name, ids=set(ids)) if ids else ():
            found += rows.to_pylist()
    if len({row["sample_id"] for row in found}) != 1:
        what = "several images" if found else "no image"
        raise UserError(f"{what} in {store.folder.address()} with an id that starts {sample_id!r}")
    return found[0]
