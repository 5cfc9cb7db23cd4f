"""A run directory on any file system that pyarrow knows: local, s3://, gs://, ...

Every write goes to a temporary name and is renamed, so that a file that exists is whole.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import yaml


class Folder:
    """A folder addressed by path or URI, with atomic writes.

    Cheap to make and to pickle, so it can travel to any actor.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri) if "://" in str(uri) else str(Path(uri).expanduser().absolute())

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.uri,)

    @property
    def filesystem(self) -> pafs.FileSystem:
        return self._resolve()[0]

    def _resolve(self) -> tuple[pafs.FileSystem, str]:
        if "://" not in self.uri:
            return pafs.LocalFileSystem(), self.uri
        try:
            return pafs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"cannot open {self.uri}: {error}") from None

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, *parts: str) -> str:
        """The path of a file inside, as `filesystem` knows it."""
        return "/".join([self._resolve()[1].rstrip("/"), *parts])

    def child(self, name: str) -> Folder:
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    def exists(self, name: str) -> bool:
        return self.filesystem.get_file_info(self.path(name)).type == pafs.FileType.File

    def names(self, suffix: str = "") -> list[str]:
        """Names of the finished files inside, sorted; none where the folder does not exist."""
        selector = pafs.FileSelector(self.path(), allow_not_found=True)
        names = (info.base_name for info in self.filesystem.get_file_info(selector) if info.is_file)
        return sorted(n for n in names if n.endswith(suffix) and not n.startswith("."))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all."""
        temporary = self._temporary(name)
        with self.filesystem.open_output_stream(temporary) as stream:
            stream.write(data)
        self._commit(temporary, name)

    def read_bytes(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return stream.read()

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, json.dumps(value, indent=2, ensure_ascii=False).encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def write_yaml(self, name: str, value: Any) -> None:
        self.write_bytes(name, yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode())

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write one Parquet file whole or not at all."""
        temporary = self._temporary(name)
        pq.write_table(table, temporary, filesystem=self.filesystem)
        self._commit(temporary, name)

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(self.path(name), columns=columns, filesystem=self.filesystem)

    def delete(self, name: str) -> None:
        if self.exists(name):
            self.filesystem.delete_file(self.path(name))

    def _temporary(self, name: str) -> str:
        *parents, base = name.split("/")
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            os.makedirs(self.path(*parents), exist_ok=True)
        return self.path(*parents, f".{base}.{uuid.uuid4().hex[:8]}.tmp")

    def _commit(self, temporary: str, name: str) -> None:
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            os.replace(temporary, self.path(name))
        else:
            self.filesystem.move(temporary, self.path(name))
