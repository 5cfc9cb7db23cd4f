"""Where training and test images lie below a folder: by the usual names, unless a class is called so."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ray_synth.data.images import EXTENSIONS
from ray_synth.data.listing import is_leftover
from ray_synth.errors import UserError, shortened

# In small letters and without marks: `Train_Set` is trainset. The first that is there is taken.
TRAIN_NAMES = ("train", "training", "trainset", "trainingset", "traindata", "trainimages", "trn")
TEST_NAMES = (
    "test", "testing", "testset", "testdata", "testimages", "tst", "val", "valid", "validation",
    "valset", "validationset", "valdata", "valimages", "eval", "evaluation", "dev", "holdout",
)  # fmt: skip


class Splits(NamedTuple):
    """Folders of a data set.

    Attributes:
        train: has the class folders to train on.
        test: None where there is none by a usual name.
        others: names of folders beside them that are not used.
    """

    train: Path
    test: Path | None
    others: list[str]


def find_splits(images: Path) -> Splits:
    """`images/train` and `images/test`, by any of the usual names; or the folder itself.

    Raises:
        UserError: two folders have the same name but for case, or one may be a split or a class.
    """
    folders = [entry.name for entry in _entries(images) if entry.is_dir()]
    splits = {name: images / name for name in folders if _holds_classes(images / name)}
    train, test = _chosen(splits, TRAIN_NAMES), _chosen(splits, TEST_NAMES)
    others = sorted(set(folders) - {folder.name for folder in (train, test) if folder})
    if train is None:
        if test is None:
            return Splits(images, None, [])
        raise UserError(
            f"{images} has {test.name}/ but no train/ beside it: put the other class folders in "
            f"{images}/train"
        )
    if test is None and any(_holds_images(images / name) for name in others):
        raise UserError(
            f"is {train} the training set, or a class as {shortened(others, 3)} may be? Of the first, "
            f"name it with --images {shlex.quote(str(train))}; of the second, call it otherwise"
        )
    return Splits(train, test, others)


def _chosen(folders: dict[str, Path], names: tuple[str, ...]) -> Path | None:
    plain = {name: re.sub(r"[^a-z]", "", name.lower()) for name in folders}
    for name in names:
        found = [folder for folder in folders if plain[folder] == name]
        if len(found) > 1:
            raise UserError(
                f"{' and '.join(sorted(str(folders[each]) for each in found))} could both be meant: "
                "rename one, or give the folders themselves with --images and --test"
            )
        if found:
            return folders[found[0]]
    return None


def _holds_classes(folder: Path) -> bool:
    """Whether a folder has folders of images in it and no images: a class has images."""
    entries = list(_entries(folder))
    if any(entry.name.lower().endswith(EXTENSIONS) for entry in entries if entry.is_file()):
        return False
    return any(_holds_images(entry.path) for entry in entries if entry.is_dir())


def _holds_images(folder: str | Path) -> bool:
    return any(
        name.lower().endswith(EXTENSIONS) for _, _, names in os.walk(folder) for name in names
    )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            yield from (entry for entry in found if not is_leftover(entry.name))
    except PermissionError as error:
        raise UserError(f"{folder} may not be read by this user ({error.strerror})") from None
