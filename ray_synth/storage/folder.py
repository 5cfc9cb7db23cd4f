"""A run directory on any file system: local, s3://, gs://, abfs://, or what fsspec knows.

A file that exists is whole. Where a rename puts a file in place (local disks, NFS, HDFS), writes go to a
temporary name first, and on a mounted disk are forced out to it before the rename (`placing.py`); an
object of S3 or GCS appears when its upload is complete, and is sent as it is. What is damaged all the
same is told by its name (`damage.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import yaml

from ray_synth.errors import UserError
from ray_synth.storage.damage import told
from ray_synth.storage.filesystems import (
    open_uri,
    patiently,
    storage_problem,
    without_file_scheme,
)
from ray_synth.storage.placing import move_file, place
from ray_synth.storage.secrets import refuse_secrets

ROW_GROUP_ROWS = 8_192
# Their objects appear when an upload is complete. Azure's do not: opening one for writing leaves an
# empty object under its name (seen on pyarrow 25.0.1).
APPEAR_WHOLE = ("s3", "gcs")
# A temporary file that nobody has written to for so long belongs to no one: days, since clocks of several
# machines, or one that is set right in between, may be hours apart.
ABANDONED_S = 2 * 86_400
DIGEST_BYTES = 8 << 20  # read at a time
T = TypeVar("T")


class Folder:
    """A folder addressed by path or URI, whose files are written whole or not at all.

    Cheap to make and to pickle, so it can travel to any actor. What a storage fails to do for a while is
    tried again (see `patiently`).

    Raises:
        UserError: the URI holds a secret; once it is used, that it cannot be opened.
    """

    def __init__(self, uri: str | Path) -> None:
        text = without_file_scheme(str(uri))
        remote = "://" in text
        self.uri = refuse_secrets(text) if remote else str(Path(text).expanduser().absolute())

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.uri,)

    @property
    def filesystem(self) -> pafs.FileSystem:
        return open_uri(self.uri)[0]

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.uri.partition("?")[0].rstrip("/").rpartition("/")[2]

    def address(self, *parts: str) -> str:
        """A path or URI for people, without options such as the endpoint."""
        return "/".join(
            [(self.uri if self.is_local else self.uri.partition("?")[0]).rstrip("/"), *parts]
        )

    def path(self, *parts: str) -> str:
        """The path of a file inside, as `filesystem` knows it."""
        return "/".join([open_uri(self.uri)[1].rstrip("/"), *parts])

    def child(self, name: str) -> Folder:
        address, mark, options = (self.uri, "", "") if self.is_local else self.uri.partition("?")
        return Folder(f"{address.rstrip('/')}/{name}{mark}{options}")

    def check_readable(self) -> None:
        """Ask for the folder. Raises UserError, with the fix, where its storage does not answer."""
        self._once("read", lambda: self.filesystem.get_file_info(self.path()))

    def check_writable(self) -> None:
        """Write and delete a file. Raises UserError, with the fix, where that cannot be done."""

        def work() -> None:
            temporary = self._temporary("writable")
            self._upload(temporary, pa.py_buffer(b""))
            self.filesystem.delete_file(temporary)

        self._once("write to", work)

    def exists(self, name: str) -> bool:
        info = self.patiently(lambda: self.filesystem.get_file_info(self.path(name)))
        return info.type == pafs.FileType.File

    def names(self, suffix: str = "") -> list[str]:
        """Names of the finished files inside, sorted; none where the folder does not exist."""
        names = (info.base_name for info in self._infos() if info.is_file)
        return sorted(n for n in names if n.endswith(suffix) and not n.startswith("."))

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Name -> (bytes, time of last change in ns) of the finished files inside, by one listing."""
        return {
            info.base_name: (info.size or 0, info.mtime_ns or 0)
            for info in self._infos()
            if info.is_file and not info.base_name.startswith(".")
        }

    def write_bytes(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Write a file whole or not at all.

        Args:
            durable: it survives a power cut; what is written anew in any case need not.
        """
        self._put(name, pa.py_buffer(data), durable=durable)

    def read_bytes(self, name: str) -> bytes:
        def read() -> bytes:
            # Not a stream: one asks an object store for 256 KiB at a time.
            with self.filesystem.open_input_file(self.path(name)) as file:
                return file.read()

        return self.patiently(read)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, json.dumps(value, indent=2, ensure_ascii=False).encode())

    def read_json(self, name: str) -> Any:
        """Raises DamagedFile where it is no JSON."""
        data = self.read_bytes(name)
        with self._told(name):
            return json.loads(data)

    def digest(self, name: str) -> str:
        """Hex SHA-256 of a file of any size."""

        def read() -> str:
            found = hashlib.sha256()
            with self.filesystem.open_input_file(self.path(name)) as file:
                while block := file.read(DIGEST_BYTES):
                    found.update(block)
            return found.hexdigest()

        return self.patiently(read)

    def write_yaml(self, name: str, value: Any) -> None:
        self.write_bytes(name, yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode())

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write one Parquet file whole or not at all; it is held in memory."""
        sink = pa.BufferOutputStream()
        # Statistics repeat values where no checksum covers them.
        pq.write_table(table, sink, write_page_checksum=True, write_statistics=False)
        self._put(name, sink.getvalue())

    @contextmanager
    def open_table(self, name: str) -> Iterator[pq.ParquetFile]:
        """A Parquet file, whose pages are held against their checksums where it has any.

        Raises:
            DamagedFile: it is no such file; also where the block finds that out.
            FileNotFoundError: there is none.
        """
        with self._told(name):
            file = self.patiently(
                lambda: pq.ParquetFile(
                    self.path(name),
                    filesystem=self.filesystem,
                    pre_buffer=True,
                    page_checksum_verification=True,
                )
            )
            with file:
                yield file

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Raises as `open_table`."""

        def read() -> pa.Table:
            with self.open_table(name) as file:
                table = file.read(columns)
                return table if columns is None else table.select(columns)

        return self.patiently(read)

    def write_tables(
        self,
        name: str,
        schema: pa.Schema,
        tables: Iterable[pa.Table],
        *,
        row_group_size: int = ROW_GROUP_ROWS,
    ) -> None:
        """Write tables as they come into one Parquet file, whole or not at all.

        An error of `tables` passes through and leaves nothing behind.

        Args:
            schema: of every table; the file has it even where there is no table.
            row_group_size: rows that `read_rows` reads at once; the last group of a table may have
                fewer.
        """
        # Without statistics the footer, which every reader fetches, has 40 % fewer bytes.
        with (
            self.stream(name) as sink,
            pq.ParquetWriter(
                sink, schema, compression="zstd", write_statistics=False, write_page_checksum=True
            ) as writer,
        ):
            for table in tables:
                writer.write_table(table, row_group_size=row_group_size)

    @contextmanager
    def stream(self, name: str) -> Iterator[pa.NativeFile]:
        """A file of any size that appears under its name when the block ends, and not if it fails.

        For a remote folder it is first written to this machine's disk: a client completes the upload
        of what it was given when it is closed, also by an error.
        """
        if self.is_local:
            temporary = self._temporary(name)
            try:
                with pa.OSFile(temporary, "wb") as stream:
                    yield stream
                place(temporary, self.path(name))
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        else:
            with tempfile.TemporaryDirectory(prefix="ray-synth-") as folder:
                with pa.OSFile(f"{folder}/file", "wb") as stream:
                    yield stream
                with pa.memory_map(f"{folder}/file") as written:
                    self._put(name, written.read_buffer())

    def read_rows(
        self, name: str, start: int, stop: int, columns: list[str] | None = None
    ) -> pa.Table:
        """Rows `start` to `stop` (without it) of a Parquet file, as a slice; fewer past its end.

        Only the row groups that hold them are read.
        """
        assert 0 <= start <= stop, f"rows {start} to {stop}"
        return self.patiently(lambda: self._read_rows(name, start, stop, columns))

    def _read_rows(self, name: str, start: int, stop: int, columns: list[str] | None) -> pa.Table:
        with self.open_table(name) as file:
            groups = range(file.num_row_groups)
            ends = np.cumsum([file.metadata.row_group(group).num_rows for group in groups])
            first = int(np.searchsorted(ends, start, side="right"))
            last = int(np.searchsorted(ends, stop, side="left"))
            table = file.read_row_groups(list(groups[first : last + 1]), columns=columns)
            begin = int(ends[first - 1]) if first else 0
            table = table.slice(start - begin, stop - start)
            return table if columns is None else table.select(columns)

    def move(self, name: str, to: str) -> None:
        """Give a file another name inside; what has that name is replaced."""
        if self.is_local:
            os.makedirs(os.path.dirname(self.path(to)), exist_ok=True)
            os.replace(self.path(name), self.path(to))
        else:
            self.patiently(lambda: move_file(self.filesystem, self.path(name), self.path(to)))

    def delete(self, name: str) -> None:
        if self.exists(name):
            self.patiently(lambda: self.filesystem.delete_file(self.path(name)))

    def remove_empty(self) -> None:
        """Remove a local folder that holds nothing; object stores have no such folders."""
        if self.is_local:
            with suppress(OSError):
                os.rmdir(self.path())

    def sweep(self) -> None:
        """Delete temporary files right inside that a killed writer left, `ABANDONED_S` ago or more."""
        if self.filesystem.type_name in APPEAR_WHOLE:
            return
        found = [
            info
            for info in self._infos()
            if info.is_file and info.base_name.startswith(".") and info.base_name.endswith(".tmp")
        ]
        if not found:
            return
        now = self._storage_time()
        for info in found:
            if info.mtime is not None and now - info.mtime.timestamp() > ABANDONED_S:
                self.patiently(partial(self.filesystem.delete_file, info.path))

    def _storage_time(self) -> float:
        """What a file that is written now is dated, seconds since 1970: the storage's clock, not ours."""
        temporary = self._temporary("clock")
        self.patiently(lambda: self._upload(temporary, pa.py_buffer(b"")))
        info = self.filesystem.get_file_info(temporary)
        self.patiently(lambda: self.filesystem.delete_file(temporary))
        # Where both clocks are known, the earlier one: rather too little is swept.
        return min(time.time(), info.mtime.timestamp()) if info.mtime else time.time()

    def _infos(self) -> list[pafs.FileInfo]:
        def look() -> list[pafs.FileInfo]:
            selector = pafs.FileSelector(self.path(), allow_not_found=True)
            return self.filesystem.get_file_info(selector)

        return self.patiently(look)

    def patiently(self, work: Callable[[], T]) -> T:
        """Do what this storage may fail to do for a while."""
        return patiently(work, remote=not self.is_local)

    def _once(self, what: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except (OSError, pa.ArrowException) as error:
            missing = isinstance(error, FileNotFoundError) and not self.is_local
            problem = "the bucket does not exist: create it first" if missing else None
            problem = problem or storage_problem(error, self.uri)
            if not problem and what == "write to":
                problem = f"{error}; give another runs_dir, or the right to write there"
            raise UserError(f"cannot {what} {self.address()}: {problem or error}") from None

    def _temporary(self, name: str) -> str:
        *parents, base = name.split("/")
        if self.is_local:
            os.makedirs(self.path(*parents), exist_ok=True)
        return self.path(*parents, f".{base}.{uuid.uuid4().hex[:8]}.tmp")

    def _told(self, name: str) -> Any:
        return told(self.address(name), remote=not self.is_local)

    def _put(self, name: str, data: pa.Buffer, *, durable: bool = True) -> None:
        self.patiently(lambda: self._write(name, data, durable))

    def _write(self, name: str, data: pa.Buffer, durable: bool) -> None:
        filesystem, path = self.filesystem, self.path(name)
        if filesystem.type_name in APPEAR_WHOLE:
            # A stream that is closed, by an exception or by the garbage collector, completes the upload
            # of what it has: nothing may come between opening it and its last byte. Signals are
            # handled in the main thread, and this is done in another.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(self._upload, path, data).result()
            return
        temporary = self._temporary(name)
        try:
            self._upload(temporary, data)
            if self.is_local:
                place(temporary, path, durable=durable)
            else:
                move_file(filesystem, temporary, path)
        except BaseException:
            with suppress(Exception):  # what was written of it, if anything
                filesystem.delete_file(temporary)
            raise

    def _upload(self, path: str, data: pa.Buffer) -> None:
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)
