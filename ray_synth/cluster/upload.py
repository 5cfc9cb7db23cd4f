"""What a submitted job takes along: its config, the small files that the config names, this package.

The rule for every local path: a relative one is uploaded, to the same place under the job's working
directory; an absolute one is the cluster's own, and must be on its nodes. Images and models are never
uploaded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray_synth
from ray_synth.cluster.includes import LeftOut, refuse_credential, walk
from ray_synth.config import Config, SourceConfig
from ray_synth.errors import UserError

LIMIT = 512 << 20  # bytes that Ray takes as a working directory
MOST_LINES = 40  # of files that go, and of what stays


@dataclass
class Upload:
    """Files by their place in the job's working directory, and what a user should know of the rest.

    Attributes:
        code: how many of the files are this package's.
        left_out: what of the named folders stays here.
        runs: where runs are kept on this machine; they stay.
    """

    files: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    code: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    runs: Path | None = None

    def add(self, setting: str, value: str) -> None:
        """Take along a file, or what is in a folder, that is named by a relative path.

        Raises:
            UserError: there is none, it lies outside of the current folder, or holds credentials.
        """
        place = os.path.normpath(value)
        if os.path.isabs(place) or place.startswith(".."):
            raise UserError(
                f"{setting} {value}: files of a job are uploaded from the current folder downwards; "
                "start from a folder above it"
            )
        path = Path(place)
        if not path.exists():
            raise UserError(f"{setting}: no such file: {value}")
        refuse_credential(setting, path)
        if not path.is_dir():
            self.files[path.as_posix()] = path.absolute()
            return
        if not path.resolve().is_relative_to(Path.cwd().resolve()):
            raise UserError(
                f"{setting} {value} is a link to {path.resolve()}, which is outside of the current "
                "folder: start from a folder above both, and name that"
            )
        for name in walk(path, self.left_out, runs=self.runs):
            self.files[name.as_posix()] = name.absolute()

    def size(self) -> int:
        """In bytes, before compression."""
        return sum(path.stat().st_size for path in self.files.values())

    def check_size(self) -> None:
        """Raises UserError where Ray would not take it."""
        if self.size() > LIMIT:
            largest = max(self.files, key=lambda name: self.files[name].stat().st_size)
            raise UserError(
                f"the job would upload {_mb(self.size())}, and Ray takes {_mb(LIMIT)} at most; the "
                f"largest file is {largest} ({_mb(self.files[largest].stat().st_size)}). Put large "
                "files where every node reaches them, and name them by URI or absolute path"
            )

    def write(self, folder: Path) -> None:
        """Lay the files out as the job will find them."""
        for name, path in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def describe(self) -> list[str]:
        """Lines to print: the files of the user's with their sizes, the largest first where they are
        many, the code in one line, the whole size, and what stays here."""
        code = {name for name in self.files if self.code and name.startswith("ray_synth/")}
        sizes = {name: path.stat().st_size for name, path in self.files.items() if name not in code}
        names = list(sizes)
        if len(names) > MOST_LINES:
            names = sorted(names, key=lambda name: -sizes[name])[:MOST_LINES]
        lines = [f"uploads {name} ({_mb(sizes[name])})" for name in names]
        if rest := sizes.keys() - set(names):
            lines.append(
                f"uploads {len(rest):,} smaller files ({_mb(sum(sizes[name] for name in rest))})"
            )
        if self.code:
            size = sum(self.files[name].stat().st_size for name in code)
            lines.append(f"uploads ray-synth {ray_synth.__version__} ({_mb(size)})")
        lines.append(f"in all {_mb(self.size())} before compression")
        lines += [f"left out: {place} ({why})" for place, why in self.left_out[:MOST_LINES]]
        if (more := len(self.left_out) - MOST_LINES) > 0:
            lines.append(f"left out: {more:,} more")
        return lines


def gather(
    config: Config | None, config_path: Path | None, *, code: bool, include: Sequence[str] = ()
) -> Upload:
    """All that a job needs of this machine.

    Args:
        config_path: where the config was read from; it is uploaded as `config/<name>`.
        code: also this package itself.
        include: further files and folders, by relative paths.

    Raises:
        UserError: the config names data or models by a relative path, or a file that is not there.
    """
    upload = Upload()
    if config is not None and not _is_uri(config.runs_dir):
        upload.runs = Path(config.runs_dir).expanduser()
    if config is not None and config_path is not None:
        upload.files[config_place(config_path)] = config_path.absolute()
        _add_config(upload, config)
    for value in include:
        upload.add("--include", value)
    if code:
        package = Path(ray_synth.__file__).absolute().parent
        for path in _own_code(package):
            upload.files[path.relative_to(package.parent).as_posix()] = path
            upload.code += 1
    upload.check_size()
    return upload


def config_place(path: Path) -> str:
    """Where a job finds its config."""
    return f"config/{path.name}"


def is_checkout() -> bool:
    """Whether this package runs from a working copy, which its version alone does not identify."""
    return (Path(ray_synth.__file__).absolute().parents[1] / "pyproject.toml").is_file()


def _add_config(upload: Upload, config: Config) -> None:
    for name, source in {"train": config.data.train, "test": config.data.test}.items():
        _check_source(upload, f"data.{name}.path", source)
    for name, source in config.data.ood.items():
        _check_source(upload, f"data.ood.{name}.path", source)
    if config.studies.pool:
        pool = SourceConfig(format="imagefolder", path=config.studies.pool)
        _check_source(upload, "studies.pool", pool)
    for setting, value in _small_files(config).items():
        if _is_uri(value):
            continue
        if os.path.isabs(value):
            upload.notes.append(_must_exist(setting, value))
        else:
            upload.add(setting, value)
    for setting, value in _models(config).items():
        if os.path.isabs(value):
            upload.notes.append(_must_exist(setting, value))
        elif Path(value).exists():
            raise UserError(
                f"{setting} {value} is a relative path, and models are not uploaded: give an "
                "absolute path that every node has, or a hub id"
            )
    if not (_is_uri(config.runs_dir) or Path(config.runs_dir).expanduser().is_absolute()):
        upload.notes.append(
            f"runs_dir {config.runs_dir!r} is relative: the run will be in ~/ray-synth/"
            f"{config.runs_dir} of the head node, which other nodes do not reach; give a shared folder "
            "or a URI with --set runs_dir=..."
        )
    elif not _is_uri(config.runs_dir):
        upload.notes.append(_must_exist("runs_dir", config.runs_dir))


def _check_source(upload: Upload, setting: str, source: SourceConfig) -> None:
    path = source.path
    if path is None or _is_uri(path):
        return
    if source.format == "huggingface" and not Path(path).exists():
        return  # an id on the hub
    if not os.path.isabs(path):
        raise UserError(
            f"{setting} {path} is relative to this machine's current folder, and images are not "
            "uploaded: give an absolute path that every node has, or a URI (s3://, gs://)"
        )
    upload.notes.append(_must_exist(setting, path))


def _must_exist(setting: str, value: str) -> str:
    return f"{setting} is a local path: {value} must be there on every node"


def _small_files(config: Config) -> dict[str, str]:
    """Settings that name a file which is small enough to take along."""
    names, recipe = config.data.class_names, config.training.recipe
    found = {
        "data.class_names": names if isinstance(names, str) and names != "imagenet" else None,
        "prompting.styles": config.prompting.styles,
        "training.recipe": recipe if recipe and recipe.endswith((".yaml", ".yml")) else None,
        "training.checkpoint": config.training.checkpoint,
    }
    return {setting: value for setting, value in found.items() if value}


def _models(config: Config) -> dict[str, str]:
    """Settings that may name a folder or a large file."""
    return {
        "meaning.llm.model": config.meaning.llm.model,
        "meaning.clip.model": config.meaning.clip.model.removeprefix("local-dir:"),
        "meaning.lexicon": config.meaning.lexicon,
        "generation.model": config.generation.model,
        **{
            f"generation.adapters.{at}.path": adapter.path
            for at, adapter in enumerate(config.generation.adapters)
        },
    }


def _is_uri(value: str) -> bool:
    return "://" in value


def _own_code(package: Path) -> Iterator[Path]:
    """This package's files, in order."""
    for path in sorted(package.rglob("*")):
        if "__pycache__" not in path.parts and path.is_file():
            yield path


def _mb(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 1024:,.1f} KiB"
