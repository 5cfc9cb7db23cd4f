"""Whatever data people bring: read as a plain reader reads them, or refused with the file's name.

A reference reader stands beside each format. It is slow and short, and shares no code with the package.
"""

import io
import json
import math
import tarfile
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_synth.config import SourceConfig
from ray_synth.data.class_names import read_class_names
from ray_synth.data.dataset import load_index, read_index
from ray_synth.errors import UserError

LETTERS = "aAbBé\u0301\u200c 0-._#\u3000日'"
USUAL = st.sampled_from(
    ["cat", " cat", "cat\n", "dog", "Dog", "K\u0061\u0308", "K\u00e4", "0", "1", "2", "07", "-1"]
)
WORDS = st.one_of(USUAL, USUAL, USUAL, st.text(LETTERS, min_size=1, max_size=4))
CLASSES = st.one_of(
    st.none(),
    st.none(),
    st.permutations(["cat", "dog", "K\u0061\u0308", "Cat"]),
    st.permutations(["cat ", "-1", "1", "0"]),
    st.lists(WORDS, min_size=1, max_size=4),
)


class Refused(Exception):
    """The reference reader cannot read it either."""


def plain(text):
    return unicodedata.normalize("NFC", text).strip().strip("\ufeff").strip()


def names_of(given):
    """The reference for class names; None where there are none."""
    if given is None:
        return None
    names = [plain(name) for name in given]
    if not names or "" in names or len(set(names)) < len(names):
        raise Refused
    return names


def classes_of(labels, class_names):
    """The reference for classes: (class names, class of each row or None)."""
    known = set(class_names or ())
    labels = [
        None if x and x[0] == "-" and x[1:].isdecimal() and x.isascii() and x not in known else x
        for x in labels
    ]
    found = {label for label in labels if label is not None}
    if not found:
        raise Refused
    names = sorted(found) if class_names is None else class_names
    numbers = not found & set(names) and all(x.isascii() and x.isdecimal() for x in found)
    if numbers:
        if any(int(x) >= len(names) for x in found):
            raise Refused
        rows = [None if x is None else names[int(x)] for x in labels]
    else:
        rows = [x if x in names else None for x in labels]
    if not any(rows):
        raise Refused
    return names, rows


def agree(source, place, class_names, labels):
    """That an index has what the reference has, row by row.

    Args:
        labels: by image (its bytes) of the source, in any order; or a Refused.
    """
    try:
        if isinstance(labels, Refused):
            raise labels
        if not labels:
            raise Refused
        names, classes = classes_of(list(labels.values()), class_names)
    except Refused:
        with pytest.raises(UserError) as refusal:
            load_index(source, None if class_names is None else tuple(class_names))
        assert str(place) in str(refusal.value)
        return
    index = load_index(source, None if class_names is None else tuple(class_names))
    assert index.class_names == tuple(names)
    expected = dict(zip(labels, classes, strict=True))
    read = {row["image"]: names[row["class_index"]] for row in read_index(index)}
    assert read == {image: name for image, name in expected.items() if name is not None}
    assert index.counts() == {name: Counter(expected.values())[name] for name in names}
    left = index.left_out.unlabelled + sum(index.left_out.unmatched.values())
    assert left == list(expected.values()).count(None)


# Folders of images.

FOLDER_NAMES = st.one_of(
    WORDS.filter(lambda name: name.strip(".")), st.sampled_from(["__MACOSX", ".x", "@eaDir"])
)
FILE_NAMES = st.sampled_from(
    ["0.png", "0.png", "1.JPG", "._0.png", "b.jfif", "c.heic", "IMG_1", "a.txt", ".png"]
)
FOLDERS = st.tuples(
    st.lists(st.tuples(st.lists(FOLDER_NAMES, max_size=3), FILE_NAMES), min_size=1, max_size=8),
    st.sampled_from([True, True, False]),
)


def check_folder(folders, given):
    files, no_empty_class = folders
    if no_empty_class:
        files = [*files, *(([parts[0]], "z.png") for parts, _ in files if parts)]
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "images"
        root.mkdir()
        for number, (parts, name) in enumerate(files):
            (root / "/".join(parts)).mkdir(parents=True, exist_ok=True)
            (root / "/".join(parts) / name).write_bytes(str(number).encode())
        junk = ("__macosx", "@eadir")
        labels, tops, full = {}, set(), set()
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            if any(part.startswith(".") or part.lower() in junk for part in parts):
                continue
            if path.is_dir():
                tops.add(parts[0])
            elif len(parts) > 1 and path.suffix.lower() in (".png", ".jpg", ".jfif"):
                labels[path.read_bytes()] = plain(parts[0]) or None
                full.add(parts[0])
        found = labels if tops and tops == full else Refused()
        source = SourceConfig(format="imagefolder", path=str(root))
        compare(source, root, given, found)


def compare(source, place, given, found):
    try:
        names = names_of(given)
    except Refused:
        with pytest.raises(UserError, match=r"data\.class_names"):
            read_class_names(given)
        return
    assert read_class_names(given) == (names if names is None else tuple(names))
    agree(source, place, names, found)


# Parquet tables.

NUMBERS = st.integers(-1, 2)
ODD_CELLS = (
    st.integers(-2, 9),
    st.sampled_from([0.0, 1.0, 2.0, float("nan"), -1.0]),
    st.sampled_from([0.5, math.inf, 1.0]),
    st.booleans(),
    st.sampled_from([b"cat", b" dog", b""]),
    st.sampled_from([b"cat", b"\xff"]),
    st.lists(WORDS, max_size=2),
    st.dates(),
)
CELLS = st.one_of(
    *(
        st.lists(st.one_of(st.none(), kind), min_size=1, max_size=6)
        for kind in (WORDS, WORDS, WORDS, NUMBERS, NUMBERS, NUMBERS, *ODD_CELLS)
    )
)
OWN_NAMES = st.one_of(
    st.none(), st.permutations(["dog", "cat ", "Cat"]), st.lists(WORDS, min_size=1, max_size=4)
)
TABLES = st.tuples(CELLS, OWN_NAMES, st.integers(1, 3), st.booleans())


def label_of_cell(cell, own):
    """The reference for a cell."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, bool):
        return str(cell)
    if isinstance(cell, bytes):
        try:
            cell = cell.decode()
        except UnicodeDecodeError:
            raise Refused from None
    if isinstance(cell, str):
        return plain(cell) or None
    if isinstance(cell, float) and (math.isinf(cell) or cell % 1):
        raise Refused
    if not isinstance(cell, int | float) or (own and cell >= len(own)):
        raise Refused
    return plain(own[int(cell)]) if own and cell >= 0 else str(int(cell))


def check_table(table, given):
    cells, own, rows_per_group, as_categories = table
    images = [str(number).encode() for number in range(len(cells))]
    column = pa.array(cells)
    if as_categories and pa.types.is_string(column.type):
        column = column.dictionary_encode()
    made = pa.table({"image": pa.array(images, pa.binary()), "label": column})
    if own:
        features = {"label": {"names": own, "_type": "ClassLabel"}}
        made = made.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    try:
        if all(isinstance(cell, list | None) for cell in cells) and any(
            c is not None for c in cells
        ):
            raise Refused
        found = dict(zip(images, [label_of_cell(cell, own) or None for cell in cells], strict=True))
    except Refused as refusal:
        found = refusal
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.parquet"
        pq.write_table(made, path, row_group_size=rows_per_group)
        compare(SourceConfig(format="parquet", path=str(path)), path, given, found)


# Tar files.

TEXTS = st.tuples(st.sampled_from(["cls", "txt"]), WORDS.map(str.encode))
JSON = st.one_of(st.none(), st.integers(-1, 3), WORDS).map(
    lambda label: ("json", json.dumps({"label": label}).encode())
)
BROKEN = st.tuples(
    st.sampled_from(["json", "cls"]),
    st.sampled_from([b"{", b"[]", b"{}", b'{"label": [1]}', b"\xff", b" 1 \n", b""]),
)
MEMBERS = st.one_of(
    st.lists(st.one_of(st.none(), TEXTS, JSON), min_size=1, max_size=5),
    st.lists(st.one_of(TEXTS, JSON), min_size=1, max_size=5),
    st.lists(st.one_of(TEXTS, JSON, BROKEN), min_size=1, max_size=5),
)


def label_of_member(member):
    if member is None:
        return None
    kind, data = member
    try:
        return label_of_cell(json.loads(data)["label"] if kind == "json" else data, None)
    except (ValueError, TypeError, KeyError, Refused):
        return None  # one bad member costs its own image alone


def check_tar(members, given):
    images = [str(number).encode() for number in range(len(members))]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.tar"
        with tarfile.open(path, "w") as tar:
            for number, member in enumerate(members):
                parts = [("png", images[number]), *([member] if member else [])]
                for suffix, data in parts:
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        try:
            found = dict(zip(images, map(label_of_member, members), strict=True))
        except Refused as refusal:
            found = refusal
        compare(SourceConfig(format="webdataset", path=str(path)), path, given, found)


# Files of class names.

ENDS = st.sampled_from(["\n", "\r\n", "\r"])
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le"])
LINES = st.lists(
    st.one_of(WORDS.filter(lambda word: "\n" not in word), st.sampled_from(["", "  "])),
    max_size=5,
    unique_by=plain,
)


def check_names(lines, end, encoding):
    try:
        data = end.join(lines).encode(encoding)
    except UnicodeEncodeError:
        hypothesis.reject()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "names.txt"
        path.write_bytes(data)
        try:
            if encoding in ("latin-1", "utf-16-le"):
                text = data.decode()
                if any(character < "\t" for character in text):
                    raise Refused
                lines = io.StringIO(text, newline=None).read().split("\n")
            names = names_of([line for line in lines if plain(line)])
        except (Refused, UnicodeDecodeError):
            with pytest.raises(UserError) as refusal:
                read_class_names(str(path))
            assert str(path) in str(refusal.value)
        else:
            assert read_class_names(str(path)) == tuple(names)


CHECKS = {
    "folders": (check_folder, (FOLDERS, CLASSES)),
    "tables": (check_table, (TABLES, CLASSES)),
    "tars": (check_tar, (MEMBERS, CLASSES)),
    "names": (check_names, (LINES, ENDS, ENCODINGS)),
}


def fuzz(kind, examples, **settings):
    check, strategies = CHECKS[kind]
    hypothesis.settings(max_examples=examples, deadline=None, database=None, **settings)(
        hypothesis.given(*strategies)(check)
    )()


@pytest.mark.parametrize("kind", CHECKS)
def test_data_are_read_as_a_plain_reader_reads_them_or_refused_by_name(kind):
    fuzz(kind, 20, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKS)
def test_so_are_five_hundred_of_each(kind):
    fuzz(kind, 500)
