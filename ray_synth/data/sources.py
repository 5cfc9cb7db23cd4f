"""Readers of labelled images: a source is cut into shards, a shard gives labels and encoded images.

`list_shards` and `read_labels` touch as little as each format allows (names in folders, one column in
tables), so that a source is indexed without reading its pictures. No Ray here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_synth.config import SourceConfig
from ray_synth.data.boundary import reading
from ray_synth.data.cells import image_bytes
from ray_synth.data.digits import load_digits
from ray_synth.data.image_lists import read_image_list
from ray_synth.data.images import EXTENSIONS, encode_array
from ray_synth.data.labels import Labels, class_label, read_column, read_texts
from ray_synth.data.listing import ending, list_files
from ray_synth.data.places import Place, Readable, read_all
from ray_synth.data.tar_cache import known_tar
from ray_synth.data.tars import tell_left_out
from ray_synth.errors import UserError, first_line, shortened
from ray_synth.storage.filesystems import at_once, open_uri
from ray_synth.storage.hub import Repo, hub_problem, is_hub_id

FILES_PER_SHARD = 256
ROWS_PER_SHARD = 1024
ABSENT = pafs.FileType.NotFound


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

    @property
    def prefix(self) -> str:
        """What the names of its rows begin with; shards of a folder share one."""
        source = self.source
        match source.format:
            case "digits" | "uci_digits":
                return f"{source.format}/{source.split or 'test'}/"
            case "imagefolder":
                return f"{self.place}/"
            case "parquet":
                return f"{self.place}#{self.start}:"
        return f"{self.place}#"

    @property
    def first_row(self) -> int:
        """What its first row is called, where rows are numbered."""
        return self.start if self.source.format == "huggingface" else 0

    def image_id(self, row: int) -> str:
        """The name of a row, in logs and records."""
        source = self.source
        match source.format:
            case "digits" | "uci_digits":
                return f"{self.prefix}{load_digits(source.format, source.split)[1][row]}/{row}"
            case "parquet":
                return f"{self.prefix}{row}"
            case "huggingface":
                return f"{self.prefix}{self.first_row + row}"
        assert self.members is not None
        return f"{self.prefix}{self.members['name'][row]}"

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


class Found(NamedTuple):
    """What a source is made of.

    Attributes:
        shards: its pieces, in order.
        passed_over: files that are not read, by what they are.
    """

    shards: list[Shard]
    passed_over: Counter[str]


def list_shards(source: SourceConfig) -> Found:
    """Cut a source into shards.

    Raises:
        UserError: the place does not exist, cannot be read, holds no images, or has an empty class
            folder.
    """
    with reading(str(source.path)):
        return _list_shards(source)


def _list_shards(source: SourceConfig) -> Found:
    match source.format:
        case "digits" | "uci_digits":
            _, labels = load_digits(source.format, source.split)
            return Found([Shard(source, source.format, 0, len(labels))], Counter())
        case "imagefolder":
            return _folder_shards(source)
        case "parquet":
            return _parquet_shards(source)
        case "webdataset":
            filesystem, _ = open_uri(str(source.path))
            paths, passed_over = matching(source, (".tar",))
            scanned = at_once(lambda path: known_tar(filesystem, path, source), paths)
            scans = dict(zip(paths, scanned, strict=True))
            tell_left_out(source, scans)
            shards = [
                Shard(source, path, 0, scan.images.num_rows, scan.images)
                for path, scan in scans.items()
                if scan.images.num_rows
            ]
            return Found(shards, passed_over)
        case "huggingface":
            count = len(_huggingface(source))
            starts = range(0, count, ROWS_PER_SHARD)
            cut = [
                Shard(source, str(source.path), s, min(s + ROWS_PER_SHARD, count)) for s in starts
            ]
            return Found(cut, Counter())
    raise AssertionError(source.format)


def read_labels(shard: Shard) -> Labels:
    """The label of each row of a shard, in order. Raises UserError for what is no label."""
    source = shard.source
    match source.format:
        case "digits" | "uci_digits":
            return read_texts(load_digits(source.format, source.split)[1])
        case "imagefolder" | "webdataset":
            assert shard.members is not None
            return read_column(shard.members["label"], shard.place)
        case "parquet":
            return _parquet_labels(shard)
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
                with reading(shard.place):
                    value = dataset[shard.start + row][source.image_column]
                yield shard.image_id(row), image_bytes(value, source)


def matching(source: SourceConfig, suffixes: tuple[str, ...]) -> tuple[list[str], Counter[str]]:
    """Files under a path: the file itself, those a `*` pattern names, or all in the folder; and what
    was passed over."""
    import fnmatch

    place = str(source.path)
    pattern = "*"
    if "*" in place and open_uri(place)[0].get_file_info(open_uri(place)[1]).type == ABSENT:
        place, _, pattern = place.rpartition("/")
        place = place or "."
    filesystem, path = open_uri(place)
    info = filesystem.get_file_info(path)
    if info.type == ABSENT:
        raise UserError(f"no such file or folder: {source.path}")
    if info.is_file:
        return [path], Counter()
    found = list_files(filesystem, path.rstrip("/"))
    names = [
        f"{path.rstrip('/')}/{name}"
        for name in found.files
        if name.lower().endswith(suffixes) and fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], pattern)
    ]
    if not names:
        raise UserError(f"no {' or '.join(suffixes)} files in {source.path}")
    return names, found.passed_over


def _folder_shards(source: SourceConfig) -> Found:
    """Class folders of images, as torchvision's ImageFolder reads them."""
    filesystem, root = open_uri(str(source.path))
    root = root.rstrip("/")
    if filesystem.get_file_info(root).type != pafs.FileType.Directory:
        raise UserError(f"no such folder: {source.path}")
    if source.image_list:
        return Found(chunked(source, root, read_image_list(source.image_list)), Counter())
    found = list_files(filesystem, root)
    if not found.folders:
        raise UserError(f"{source.path} has no class folders; expected {source.path}/CLASS/*.jpg")
    files: list[tuple[str, str]] = []  # (path below the root, label)
    others: list[str] = []
    for name in found.files:
        label, inside, _ = name.partition("/")
        is_image = name.lower().endswith(EXTENSIONS)
        if inside and is_image:
            files.append((name, label))
        elif inside:
            others.append(name)
        elif is_image:
            found.passed_over["images beside the class folders"] += 1
    empty = sorted(found.folders - {label for _, label in files})
    if empty:
        kinds = Counter(ending(name) for name in others if name.startswith(f"{empty[0]}/"))
        there = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        raise UserError(
            f"no images in the class folder {source.path}/{shortened(empty, 1)}"
            f"{f' (it holds {there})' if there else ''}; add "
            f"images ({', '.join(EXTENSIONS[:4])}, ...) or remove the folder"
        )
    found.passed_over.update(map(ending, others))
    return Found(chunked(source, root, files), found.passed_over)


def chunked(source: SourceConfig, root: str, files: list[tuple[str, str]]) -> list[Shard]:
    """Shards of pictures in a folder: (path below it, label) of each."""
    parts = [files[s : s + FILES_PER_SHARD] for s in range(0, len(files), FILES_PER_SHARD)]
    return [Shard(source, root, 0, len(part), _files(part)) for part in parts]


def _files(files: list[tuple[str, str]]) -> pa.RecordBatch:
    return pa.record_batch(
        [pa.array(column) for column in zip(*files, strict=True)], ["name", "label"]
    )


def _parquet_shards(source: SourceConfig) -> Found:
    filesystem, _ = open_uri(str(source.path))

    def groups(path: str) -> list[Shard]:
        with reading(path):
            file = pq.ParquetFile(path, filesystem=filesystem)
        for column in (source.image_column, source.label_column):
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path} has no column {column!r}; it has {names}")
        return [Shard(source, path, group) for group in range(file.num_row_groups)]

    paths, passed_over = matching(source, (".parquet",))
    return Found([s for shards in at_once(groups, paths) for s in shards], passed_over)


def _parquet_labels(shard: Shard) -> Labels:
    column = shard.source.label_column
    table = _row_group(shard, [column])
    names = class_label(table.schema.metadata, column, shard.place)
    return read_column(table.column(0), f"{shard.place}, column {column!r}", names)


def _row_group(shard: Shard, columns: list[str]) -> Any:
    filesystem, _ = open_uri(str(shard.source.path))
    with reading(shard.place):
        file = pq.ParquetFile(shard.place, filesystem=filesystem)
        return file.read_row_group(shard.start, columns)


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


def _huggingface_labels(shard: Shard) -> Labels:
    dataset, column = _huggingface(shard.source), shard.source.label_column
    rows = dataset.select(range(shard.start, shard.stop)).select_columns(column)
    values = rows.with_format("arrow")[:].column(0)
    names = getattr(dataset.features[column], "names", None) or ()
    return read_column(values, f"{shard.place}, column {column!r}", names)
