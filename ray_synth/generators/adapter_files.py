"""The files of `generation.adapters`: where each is, what it holds, and what may be read of it.

In: an adapter of the config. Out: its safetensors file on this machine, looked at; its digest; the word
and the vectors of a textual inversion; the folder of an IP-Adapter's image encoder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from ray_synth.config import AdapterConfig
from ray_synth.errors import UserError, first_line
from ray_synth.storage.filesystems import open_uri
from ray_synth.storage.hub import Repo, fetch, is_hub_id

FILES = {
    "lora": "pytorch_lora_weights.safetensors",
    "textual_inversion": "learned_embeds.safetensors",
    "ip_adapter": "models/ip-adapter_sd15.safetensors",
}
ENCODER = ("config.json", "model.safetensors")  # all that is read of an image encoder's folder
# Of a file of several words: which text encoder each is for.
ENCODERS = {"clip_l": "", "clip_g": "_2"}
UNNAMED = "emb_params"  # what other tools call the one tensor of a file
# Of the peft settings in a LoRA's header, those that may differ from peft's own defaults: numbers and
# names of layers. Others load modules or change the weights beneath.
PLAIN = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "inference_mode",
         "base_model_name_or_path", "peft_version", "init_lora_weights", "bias", "task_type")  # fmt: skip
LAYERS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


def adapter_repos(adapters: Sequence[AdapterConfig]) -> list[Repo]:
    """Those of the hub, with each file that is used of them, the adapter's own first."""
    return [
        Repo(f"generation.adapters.{at}", item.path, item.revision, "adapter", file=file)
        for at, item in enumerate(adapters)
        if _of_hub(item)
        for file in _files_of(item)
    ]


def _files_of(adapter: AdapterConfig) -> list[str]:
    name = adapter.weight_name or FILES[adapter.kind]
    if adapter.kind != "ip_adapter":
        return [name]
    folder = adapter.image_encoder or str(PurePosixPath(name).parent / "image_encoder")
    return [name, *(f"{folder.rstrip('/')}/{file}" for file in ENCODER)]


def _of_hub(adapter: AdapterConfig) -> bool:
    return is_hub_id(adapter.path) and not adapter.path.endswith(".safetensors")


def adapter_file(adapter: AdapterConfig) -> Path:
    """Its file on this machine, fetched where it is elsewhere.

    Raises:
        UserError: there is none, or no safetensors file.
    """
    if repos := adapter_repos([adapter]):
        return Path(fetch(repos[0]))
    name = adapter.weight_name or FILES[adapter.kind]
    if "://" in adapter.path:
        if adapter.kind == "ip_adapter":
            raise UserError(
                f"generation.adapters: the IP-Adapter {adapter.path} has an image encoder beside it: "
                "give a folder of this machine, or a hub id"
            )
        return _fetched(adapter.path.rstrip("/"), name)
    path = Path(adapter.path)
    if path.is_dir():
        there = sorted(found.name for found in path.glob("*.safetensors"))
        one = len(there) == 1 and not adapter.weight_name
        path = path / (there[0] if one else name)
        if not path.is_file():
            raise UserError(
                f"generation.adapters: no file {name} in {adapter.path} ({', '.join(there[:5]) or 'no'} "
                "safetensors files there); name one with weight_name"
            )
    if not path.is_file():
        raise UserError(
            f"generation.adapters: no such file: {adapter.path}; give a safetensors file, a folder that "
            "holds one, or a hub id, owner/name"
        )
    if path.suffix != ".safetensors":
        raise UserError(
            f"generation.adapters: {path} is no .safetensors file; other formats can hold code, and are "
            "not read"
        )
    return path


def encoder_folder(adapter: AdapterConfig) -> Path:
    """The folder of an IP-Adapter's image encoder on this machine, fetched where it is elsewhere.

    Raises:
        UserError: it lacks its config or its safetensors file.
    """
    if repos := adapter_repos([adapter]):
        return [Path(fetch(repo)) for repo in repos][1].parent
    file, root = adapter_file(adapter), Path(adapter.path)
    root = root if root.is_dir() else root.parent
    folder = (
        root / adapter.image_encoder if adapter.image_encoder else file.parent / "image_encoder"
    )
    lacking = [name for name in ENCODER if not (folder / name).is_file()]
    if lacking:
        raise UserError(
            f"generation.adapters: {folder}, the image encoder of {adapter.path}, has no "
            f"{' and no '.join(lacking)}; name its folder with image_encoder"
        )
    return folder


def _fetched(uri: str, name: str) -> Path:
    """A copy of a file on another file system, kept by its size and time of change."""
    place = uri if uri.endswith(".safetensors") else f"{uri}/{name}"
    filesystem, path = open_uri(place)
    found = filesystem.get_file_info(path)
    if not found.is_file:
        raise UserError(f"generation.adapters: no such file: {place}")
    key = hashlib.sha256(f"{place}:{found.size}:{found.mtime_ns}".encode()).hexdigest()[:24]
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"ray-synth-{user}-adapters"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != user:
        raise UserError(f"{folder} is another user's: set TMPDIR to a folder of your own")
    copy = folder / f"{key}.safetensors"
    if not copy.is_file():
        with (
            filesystem.open_input_stream(path) as source,
            tempfile.NamedTemporaryFile(dir=folder, delete=False) as target,
        ):
            while block := source.read(1 << 24):
                target.write(block)
        os.replace(target.name, copy)
    return copy


def adapters_identity(adapters: Sequence[AdapterConfig]) -> list[Any]:
    """What decides their part in the pixels: of a file its digest, of the hub's id its revision."""
    return [
        [
            item.kind,
            [item.path, item.revision, item.weight_name]
            if _of_hub(item)
            else _digest(adapter_file(item)),
            item.weight,
            item.token,
            *_encoder_identity(item),
        ]
        for item in adapters
    ]


def _encoder_identity(adapter: AdapterConfig) -> list[Any]:
    if adapter.kind != "ip_adapter":
        return []
    if _of_hub(adapter):
        return _files_of(adapter)[1:]
    return [_digest(encoder_folder(adapter) / name) for name in ENCODER]


def origin(adapters: Sequence[AdapterConfig]) -> list[dict[str, Any]]:
    """What the row of an image says of each."""
    return [
        {
            "path": item.path,
            **({"revision": item.revision} if _of_hub(item) else {}),
            "sha256": _digest(adapter_file(item)),
            **(
                {"token": worn_token(item)}
                if item.kind == "textual_inversion"
                else {"weight": item.weight}
            ),
            **(
                {"image_encoder": _digest(encoder_folder(item) / ENCODER[1])}
                if item.kind == "ip_adapter"
                else {}
            ),
        }
        for item in adapters
    ]


def _digest(path: Path) -> str:
    found = path.stat()
    return _digest_of(str(path), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest_of(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_header(path: Path) -> None:
    """Look at the peft settings that a LoRA's file brings, which become keyword arguments.

    Raises:
        UserError: it is no safetensors file, or a setting is not of the listed ones.
    """
    from peft import LoraConfig

    text = header(path).get("lora_adapter_metadata") or "{}"
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UserError(f"generation.adapters: the header of {path} is not as diffusers writes it")
    usual = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    for name, value in given.items():
        key = str(name).rpartition(".")[2]
        if key in usual and (value == usual[key] or value in (None, [], {})):
            continue
        simple = isinstance(value, int | float | str) and (
            key != "init_lora_weights" or isinstance(value, bool)
        )
        layers = [value] if isinstance(value, str) else list(value) if key in LAYERS else []
        names = all(re.fullmatch(r"\^?[\w.-]+", str(layer)) for layer in layers)
        if not (key in PLAIN and simple) and not (key in LAYERS and names):
            raise UserError(
                f"generation.adapters: {path} asks for peft's {key} = {str(value)[:80]!r}, which a file "
                "may not decide: save it again without"
            )


def header(path: Path) -> dict[str, str]:
    """The texts in a file's header. Raises UserError where it is no whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"generation.adapters: {path} is not a complete safetensors file ({first_line(error)})"
        ) from None


def words_of(adapter: AdapterConfig) -> dict[str, Any]:
    """Text encoder ("" or "_2", as diffusers counts them) -> (n, width) of the file's one word.

    Raises:
        UserError: the file is broken, or holds anything else.
    """
    from safetensors.torch import load_file

    path = adapter_file(adapter)
    header(path)
    held = load_file(path)
    if set(held) <= set(ENCODERS):
        found = {ENCODERS[name]: value for name, value in held.items()}
    else:
        found = dict.fromkeys([""], next(iter(held.values()))) if len(held) == 1 else {}
    rows = {part: value[None] if value.ndim == 1 else value for part, value in found.items()}
    if not rows or any(value.ndim != 2 or not len(value) for value in rows.values()):
        raise UserError(
            f"generation.adapters: {path} holds {', '.join(sorted(held)[:5]) or 'nothing'}, not the "
            "vectors of one word as a textual inversion does"
        )
    return rows


def worn_token(adapter: AdapterConfig) -> str:
    """The word of a textual inversion.

    Raises:
        UserError: neither the config nor the file says it.
    """
    from safetensors import safe_open

    if adapter.token:
        return adapter.token
    path = adapter_file(adapter)
    header(path)
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    if len(names) != 1 or names[0] in (UNNAMED, *ENCODERS) or not re.fullmatch(r"\S+", names[0]):
        raise UserError(
            f"generation.adapters: {adapter.path} does not say its word: give it as token, such as "
            "'<my-style>'"
        )
    return names[0]


def token_names(adapter: AdapterConfig) -> list[str]:
    """All that the word becomes: one token for each vector."""
    token, most = worn_token(adapter), max(len(rows) for rows in words_of(adapter).values())
    return [token, *(f"{token}_{at}" for at in range(1, most))]
