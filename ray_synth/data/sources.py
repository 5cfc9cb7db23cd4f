"""Readers of labelled images: a source is cut into shards, a shard gives labels and encoded images.

`list_shards` and `read_labels` touch as little as each format allows (names in folders, one column in
tables), so that a source is indexed without reading its pictures. No Ray here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_synth.config import SourceConfig
from ray_synth.data.cells import image_bytes
from ray_synth.data.digits import load_digits
from ray_synth.data.image_lists import read_image_list
from ray_synth.data.images import EXTENSIONS, encode_array
from ray_synth.data.places import Place, Readable, read_all
from ray_synth.data.tar_cache import known_tar
from ray_synth.data.tars import tell_left_out
from ray_synth.errors import UserError, first_line, shortened
from ray_synth.storage.filesystems import at_once, open_uri
from ray_synth.storage.hub import Repo, hub_problem, is_hub_id

FILES_PER_SHARD = 256
ROWS_PER_SHARD = 1024


@dataclass(frozen=True)
class Shard:
    """A readable piece of a source: some files, a row group, a tar, or a range of rows.

    Attributes:
        members: of files in folders, columns `name` (below `place`) and `label`; of a tar,
            `tars.MEMBERS`. Never a slice of more: it would be pickled whole.
    """

    source: SourceConfig
    place: str
    start: int = 0
    stop: int = 0
    members: pa.RecordBatch | None = field(default=None, repr=False, compare=False)

    @property
    def addressable(self) -> bool:
        """Whether one image can be read without the others around it."""
        return self.source.format != "parquet"

    def image_id(self, row: int) -> str:
        """The name of a row, in logs and records."""
        source = self.source
        match source.format:
            case "digits" | "uci_digits":
                label = load_digits(source.format, source.split)[1][row]
                return f"{source.format}/{source.split or 'test'}/{label}/{row}"
            case "parquet":
                return f"{self.place}#{self.start}:{row}"
            case "huggingface":
                return f"{self.place}#{self.start + row}"
        assert self.members is not None
        mark = "/" if source.format == "imagefolder" else "#"
        return f"{self.place}{mark}{self.members['name'][row]}"

    def locate(self, row: int) -> Readable:
        """Where the encoded bytes of a row are read from; only of what is `addressable`."""
        assert self.addressable, "a Parquet file gives whole row groups only"
        source, members = self.source, self.members
        if members is None:
            return Cell(self, row)
        if source.format == "imagefolder":
            path, inside = f"{self.place}/{members['name'][row]}", not source.follow_links
            return Place(str(source.path), path, within=inside, value_range=source.value_range)
        stretch = members["offset"][row].as_py(), members["size"][row].as_py()
        return Place(str(source.path), self.place, *stretch, value_range=source.value_range)


class Cell(NamedTuple):
    """A row of a set that a library holds: see `places.Readable`."""

    shard: Shard
    row: int

    def read(self) -> bytes:
        (found,) = read_rows(self.shard, [self.row])
        return found[1]


def list_shards(source: SourceConfig) -> list[Shard]:
    """Cut a source into shards.

    Raises:
        UserError: the place does not exist, holds no images, or has an empty class folder.
    """
    match source.format:
        case "digits" | "uci_digits":
            _, labels = load_digits(source.format, source.split)
            return [Shard(source, source.format, 0, len(labels))]
        case "imagefolder":
            return _folder_shards(source)
        case "parquet":
            return _parquet_shards(source)
        case "webdataset":
            filesystem, _ = open_uri(str(source.path))
            paths = _matching(source, (".tar",))
            scanned = at_once(lambda path: known_tar(filesystem, path, source), paths)
            scans = dict(zip(paths, scanned, strict=True))
            tell_left_out(source, scans)
            return [
                Shard(source, path, 0, scan.images.num_rows, scan.images)
                for path, scan in scans.items()
                if scan.images.num_rows
            ]
        case "huggingface":
            count = len(_huggingface(source))
            starts = range(0, count, ROWS_PER_SHARD)
            return [
                Shard(source, str(source.path), s, min(s + ROWS_PER_SHARD, count)) for s in starts
            ]
    raise AssertionError(source.format)


def read_labels(shard: Shard) -> list[str]:
    """The label of each row of a shard, in order."""
    source = shard.source
    match source.format:
        case "digits" | "uci_digits":
            return load_digits(source.format, source.split)[1]
        case "imagefolder" | "webdataset":
            assert shard.members is not None
            return shard.members["label"].to_pylist()
        case "parquet":
            column = _row_group(shard, [source.label_column]).column(0)
            return [str(value) for value in column.to_pylist()]
        case "huggingface":
            return _huggingface_labels(shard)
    raise AssertionError(source.format)


def read_rows(shard: Shard, rows: list[int]) -> Iterator[tuple[str, bytes]]:
    """(image_id, encoded bytes) of the named rows of a shard, in increasing order of row."""
    source, wanted = shard.source, sorted(rows)
    match source.format:
        case "digits" | "uci_digits":
            pixels, _ = load_digits(source.format, source.split)
            for row in wanted:
                yield shard.image_id(row), encode_array(pixels[row])
        case "imagefolder" | "webdataset":
            found = read_all(shard.locate(row) for row in wanted)
            yield from zip(map(shard.image_id, wanted), found, strict=True)
        case "parquet":
            column = _row_group(shard, [source.image_column]).column(0)
            for row in wanted:
                yield shard.image_id(row), image_bytes(column[row].as_py(), source)
        case "huggingface":
            dataset = _huggingface(source)
            for row in wanted:
                value = dataset[shard.start + row][source.image_column]
                yield shard.image_id(row), image_bytes(value, source)


def _matching(source: SourceConfig, suffixes: tuple[str, ...]) -> list[str]:
    """Files under a path: the file itself, those a `*` pattern names, or all in the folder."""
    import fnmatch

    place = str(source.path)
    pattern = None
    if "*" in place:
        place, _, tail = place.rpartition("/")
        place, pattern = place or ".", tail
    filesystem, path = open_uri(place)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"no such file or folder: {source.path}")
    if info.is_file:
        return [path]
    found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    names = sorted(f.path for f in found if f.is_file and f.path.lower().endswith(suffixes))
    if pattern:
        names = [name for name in names if fnmatch.fnmatch(name.rsplit("/", 1)[-1], pattern)]
    if not names:
        raise UserError(f"no {' or '.join(suffixes)} files in {source.path}")
    return names


def _folder_shards(source: SourceConfig) -> list[Shard]:
    """Class folders of images, as torchvision's ImageFolder reads them."""
    filesystem, root = open_uri(str(source.path))
    root = root.rstrip("/")
    if filesystem.get_file_info(root).type != pafs.FileType.Directory:
        raise UserError(f"no such folder: {source.path}")
    if source.image_list:
        return _chunked(source, root, read_image_list(source.image_list))
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    files: list[tuple[str, str]] = []  # (path below the root, label)
    folders: set[str] = set()
    for info in found:
        name = info.path[len(root) :].strip("/")
        parts = name.split("/")
        if info.type == pafs.FileType.Directory and len(parts) == 1:
            folders.add(parts[0])
        elif info.is_file and len(parts) > 1 and parts[-1].lower().endswith(EXTENSIONS):
            files.append((name, parts[0]))
    folders = {name for name in folders if not name.startswith(".")}
    files = sorted((name, label) for name, label in files if label in folders)
    empty = sorted(folders - {label for _, label in files})
    if not folders:
        raise UserError(f"{source.path} has no class folders; expected {source.path}/CLASS/*.jpg")
    if empty:
        raise UserError(
            f"no images in the class folder {source.path}/{shortened(empty, 1)}; add "
            f"images ({', '.join(EXTENSIONS[:4])}, ...) or remove the folder"
        )
    return _chunked(source, root, files)


def _chunked(source: SourceConfig, root: str, files: list[tuple[str, str]]) -> list[Shard]:
    parts = [files[s : s + FILES_PER_SHARD] for s in range(0, len(files), FILES_PER_SHARD)]
    return [Shard(source, root, 0, len(part), _files(part)) for part in parts]


def _files(files: list[tuple[str, str]]) -> pa.RecordBatch:
    return pa.record_batch(
        [pa.array(column) for column in zip(*files, strict=True)], ["name", "label"]
    )


def _parquet_shards(source: SourceConfig) -> list[Shard]:
    filesystem, _ = open_uri(str(source.path))

    def groups(path: str) -> list[Shard]:
        try:
            file = pq.ParquetFile(path, filesystem=filesystem)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} is not a Parquet file: {error}") from None
        for column in (source.image_column, source.label_column):
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path} has no column {column!r}; it has {names}")
        return [Shard(source, path, group) for group in range(file.num_row_groups)]

    return [s for shards in at_once(groups, _matching(source, (".parquet",))) for s in shards]


def _row_group(shard: Shard, columns: list[str]) -> Any:
    filesystem, _ = open_uri(str(shard.source.path))
    return pq.ParquetFile(shard.place, filesystem=filesystem).read_row_group(shard.start, columns)


def _huggingface(source: SourceConfig) -> Any:
    """A datasets.Dataset with undecoded images, from the hub or a local folder."""
    return _opened_huggingface(source.model_dump_json(exclude={"class_map", "images_per_class"}))


@lru_cache(maxsize=8)
def _opened_huggingface(source_json: str) -> Any:
    """Opened once per process; its rows lie in memory maps."""
    source = SourceConfig.model_validate_json(source_json)
    return _open_huggingface(source)


def _open_huggingface(source: SourceConfig) -> Any:
    from pathlib import Path

    import datasets

    datasets.disable_progress_bars()
    path = str(source.path)
    try:
        if (Path(path) / "dataset_info.json").exists() or (
            Path(path) / "dataset_dict.json"
        ).exists():
            loaded: Any = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, revision=source.revision)
    except Exception as error:
        repo = Repo("data path", path, source.revision, "dataset")
        refusal = hub_problem(error, repo) if is_hub_id(path) else None
        raise UserError(
            f"cannot load the Hugging Face dataset {path!r} ({refusal or first_line(error)}); give a "
            "hub id that this machine can reach, or a local folder"
        ) from None
    if isinstance(loaded, dict):
        split = source.split or "train"
        if split not in loaded:
            raise UserError(f"{path} has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    for column in (source.image_column, source.label_column):
        if column not in loaded.column_names:
            names = ", ".join(loaded.column_names)
            raise UserError(f"{path} has no column {column!r}; it has {names}")
    if isinstance(loaded.features[source.image_column], datasets.Image):
        loaded = loaded.cast_column(source.image_column, datasets.Image(decode=False))
    return loaded


def _huggingface_labels(shard: Shard) -> list[str]:
    dataset, column = _huggingface(shard.source), shard.source.label_column
    values = dataset.select(range(shard.start, shard.stop)).select_columns(column)[column]
    names = getattr(dataset.features[column], "names", None)
    return [names[value] if names else str(value) for value in values]
