"""What of a user's folder goes along with a job: its files, without credentials and what is not work.

A folder goes to the head's memory and to every node, where others can read it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from ray_synth.errors import UserError
from ray_synth.storage.secrets import TOKEN

MOST_FILES = 10_000
# Where the usual tools keep credentials; names that begin with a dot are left out of a folder anyway.
CREDENTIALS = (
    ".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".npmrc", ".pypirc",
    ".git-credentials", ".htpasswd", ".dockercfg", ".boto", ".s3cfg", ".databrickscfg", ".vault-token",
    ".aws", ".ssh", ".gnupg", ".azure", ".kube", ".docker", ".gcloud", ".kaggle", ".huggingface", ".ray",
    "gcloud", "kubeconfig", "kaggle.json", "rclone.conf", "auth_token", "htpasswd",
    "application_default_credentials.json", "credentials", "*credentials.*", "credentials.*",
    "client_secret*", "*service[-_]account*.json", "secret", "secrets", "secret.*", "secrets.*",
    "*.secret", "*.secrets", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12",
    "*.pfx", "*.jks", "*.keystore", "*.ppk", "*.kdbx", "*.gpg", "*.tfstate", "*.tfstate.*", "*.tfvars",
)  # fmt: skip
# Code and texts may be called so: `credentials.py`.
CODE = (".py", ".pyi", ".md", ".rst")
NO_WORK = (
    "__pycache__", "*.pyc", "node_modules", "site-packages", "*.egg-info", "mlruns", "mlflow.db*",
    "mlflow-artifacts",
)  # fmt: skip
RUN_FILES = ("plan.parquet", "stages", "mlflow.json", "heartbeat.json")
HEAD_BYTES = 1 << 20  # of a file, looked at for a key
KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY-----|\"private_key\"\s{0,4}:"
    r"|aws_secret_access_key\s{0,4}=\s{0,4}\S|AccountKey=\S"
)


class LeftOut(NamedTuple):
    """A file or folder that stays, and why."""

    place: str
    why: str


def is_credential(name: str) -> bool:
    """Whether a file or folder of this name is where a usual tool keeps credentials."""
    name = name.lower()
    return not name.endswith(CODE) and any(fnmatch(name, pattern) for pattern in CREDENTIALS)


def refuse_credential(setting: str, path: Path) -> None:
    """Raises UserError where a file or folder that is named on its own is one of credentials."""
    real = path.resolve()
    named = [path.name, real.name, *(part for part in path.parts if part != "..")]
    if any(is_credential(name) for name in named) or (real.is_file() and holds_key(real)):
        raise UserError(
            f"{setting} {path}: it holds credentials, which everyone on the cluster could read: pass on "
            "a variable with --env NAME, or give the nodes a role"
        )


def holds_key(path: Path) -> bool:
    """Whether a private key or a token is in the beginning of a file."""
    with path.open("rb") as file:
        text = file.read(HEAD_BYTES).decode("utf-8", "replace")
    return bool(KEY.search(text) or TOKEN.search(text))


def walk(folder: Path, left_out: list[LeftOut], *, runs: Path | None = None) -> Iterator[Path]:
    """Files below a folder, in order; a link counts as what it leads to, where that is in the folder.

    Args:
        left_out: gets what stays: hidden files, credentials, links that lead out of the folder or in
            a circle, virtual environments, runs.
        runs: where runs are kept.

    Raises:
        UserError: there are more than `MOST_FILES` files and folders.
    """
    root = folder.resolve()
    # Links inside could make a tree that is endless in width: all that is seen counts.
    for number, path in enumerate(_below(folder, root, [root], left_out, runs and runs.resolve())):
        if number >= MOST_FILES:
            raise UserError(
                f"--include {folder}: more than {MOST_FILES:,} files and folders are in it, such as "
                f"those of {path.parent}: name only what the job needs. Images are not uploaded: put "
                "them where every node reaches them"
            )
        if not path.is_dir():
            yield path


def _below(
    folder: Path, root: Path, above: list[Path], left_out: list[LeftOut], runs: Path | None
) -> Iterator[Path]:
    """Files and folders that go, a folder before what is in it."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        left_out.append(LeftOut(f"{folder}/", f"not readable: {error.strerror}"))
        return
    for path in entries:
        why = _why_not(path, root, above, runs)
        if why is None:
            yield path
            if path.is_dir():
                yield from _below(path, root, [*above, path.resolve()], left_out, runs)
        elif why:
            left_out.append(LeftOut(f"{path}/" if path.is_dir() else str(path), why))


def _why_not(path: Path, root: Path, above: list[Path], runs: Path | None) -> str | None:
    """Why a file or folder stays; "" where that need not be said, None where it goes."""
    real = Path(os.path.realpath(path))
    if not os.path.exists(path):
        return "a link that leads nowhere"
    if any(fnmatch(path.name, pattern) for pattern in NO_WORK[:2]):
        return ""
    if not real.is_relative_to(root):
        return "a link out of the folder"
    if real in above:
        return "a link in a circle"
    why = _by_name([path.name, *real.relative_to(root).parts])
    if not why and real == runs:
        why = "runs"
    return why or (_folder_of(real) if real.is_dir() else _unfit(real))


def _by_name(names: list[str]) -> str | None:
    """Why what has these names, its own and those above, stays."""
    if any(is_credential(name) for name in names):
        return "credentials"
    if any(name.startswith(".") for name in names):
        return "hidden"
    if any(fnmatch(name, pattern) for name in names for pattern in NO_WORK):
        return "not part of the work"
    return None


def _folder_of(folder: Path) -> str | None:
    """What a folder is of, where it stays."""
    if (folder / "pyvenv.cfg").exists() or (folder / "conda-meta").exists():
        return "a virtual environment"
    if (folder / "config.yaml").exists() and any((folder / name).exists() for name in RUN_FILES):
        return "a run"
    return None


def _unfit(path: Path) -> str | None:
    """Why a file cannot go."""
    if not path.is_file():
        return "not a file"
    try:
        return "a private key or a token is in it" if holds_key(path) else None
    except OSError as error:
        return f"not readable: {error.strerror}"
