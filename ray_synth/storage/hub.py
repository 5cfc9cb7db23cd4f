"""Models and data sets of a Hugging Face hub: which commit, fetched how, and what its refusals mean.

Ids and revisions come in; commits and folders in the hub's own cache come out. The hub, its token, its
cache and proxies are those of the environment (`PASSED_ON`), which huggingface_hub reads itself.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ray_synth.errors import UserError, causes, first_line

MODELS = "models.json"  # in a run directory: setting -> what was asked for, and its commit
COMMIT = re.compile(r"[0-9a-f]{40}")
# Variables that decide what a process can fetch, and from where.
PASSED_ON = (
    "HF_TOKEN", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DISABLE_XET",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy",
    "no_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip

# Copies of the weights for other libraries.
OTHER_FORMATS = (
    "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.tflite", "*.onnx", "*.onnx_data", "onnx/*", "coreml/*",
    "openvino/*", "original/*", "consolidated*",
)  # fmt: skip
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NETWORK = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError")  # of httpx


@dataclass(frozen=True)
class Repo:
    """A repository of the hub that a setting names.

    Attributes:
        setting: such as `generation.model`.
        id: `owner/name`.
        revision: a branch, tag or commit; None is the default branch.
        kind: what it is for, which decides the files that are fetched.
        variant: of diffusers' weights, such as fp16.
        file: of an adapter, the one file that is used.
    """

    setting: str
    id: str
    revision: str | None
    kind: Literal["diffusers", "transformers", "open_clip", "dataset", "adapter"]
    variant: str | None = None
    file: str = ""

    @property
    def type(self) -> str:
        return "dataset" if self.kind == "dataset" else "model"

    @property
    def entry(self) -> str:
        """A small file that every repository of its kind has; an adapter's is the file itself."""
        names = {"diffusers": "model_index.json", "open_clip": "open_clip_config.json"}
        return self.file or names.get(self.kind, "config.json")


def is_hub_id(model: str) -> bool:
    """Whether a setting names a repository of the hub, and nothing on this machine."""
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model)
    local = model == "embedded" or model.endswith(".gguf") or Path(model).exists()
    return bool(named) and not local


def open_clip_repo(model: str) -> Repo:
    """The repository of `hf-hub:ID` or `hf-hub:ID@REVISION`."""
    name, _, revision = model.removeprefix("hf-hub:").partition("@")
    return Repo("meaning.clip.model", name, revision or None, "open_clip")


@lru_cache(maxsize=64)
def commit_of(repo: Repo) -> str:
    """The commit that its revision is at now; that of the cache where the hub does not answer.

    Raises:
        UserError: there is no such repository or revision, it is gated, or it is neither reached nor
            in the cache; says what to do.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        found = HfApi().resolve_revision(repo.id, repo_type=repo.type, revision=repo.revision)
        if repo.kind != "dataset":  # a gated one shows its commit, but none of its files
            hf_hub_download(repo.id, repo.entry, revision=found.resolved)
    except RemoteEntryNotFoundError:
        return found.resolved  # which loading it will say better
    except Exception as error:  # of the hub, its client, or a proxy
        raise _told(error, repo) from None
    return found.resolved


def fetch(repo: Repo) -> str:
    """The folder of its files on this machine, fetched where they are not; an adapter's one file.

    Processes that ask for the same at once fetch each file once: the hub's client locks it.

    Raises:
        UserError: as `commit_of`, or they cannot be written.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # nobody sees a worker's
    try:
        if repo.file:
            return hf_hub_download(repo.id, repo.file, revision=repo.revision)
        if repo.kind == "diffusers":
            from diffusers import DiffusionPipeline

            return str(
                DiffusionPipeline.download(
                    repo.id, revision=repo.revision, variant=repo.variant, use_safetensors=True
                )
            )
        return snapshot_download(
            repo.id,
            repo_type=repo.type,
            revision=repo.revision,
            ignore_patterns=[*OTHER_FORMATS, *(PICKLED if _has_safetensors(repo) else ())],
        )
    except RemoteEntryNotFoundError:
        raise UserError(f"{repo.setting} {repo.id!r} holds no file {repo.entry}") from None
    except Exception as error:
        raise _told(error, repo) from None


def _has_safetensors(repo: Repo) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        names = HfApi().list_repo_files(repo.id, repo_type=repo.type, revision=repo.revision)
    except OfflineModeIsEnabled:
        return True  # what is in the cache is all there is
    return any(name.endswith(".safetensors") for name in names)


def _told(error: Exception, repo: Repo) -> UserError:
    problem = hub_problem(error, repo)
    return UserError(problem or f"{repo.setting} {repo.id!r}: {first_line(error)}")


def fetched_bytes(repo: Repo) -> int:
    """Of its files that lie in this machine's cache so far, whole or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=repo.id, repo_type=repo.type)
    total = 0
    for path in Path(constants.HF_HUB_CACHE, name, "blobs").glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # an incomplete file that was given its name meanwhile
            continue
    return total


def hub_problem(error: BaseException | None, repo: Repo) -> str | None:
    """What a failure to fetch means, and what to do; None where it is no failure of the hub's.

    Libraries wrap the hub's errors in their own: causes are looked at too.
    """
    for cause in causes(error):
        if said := _said(cause, repo):
            return f"{repo.setting} {repo.id!r} {said}; or give a folder of this machine"
    return None


def _said(error: BaseException, repo: Repo) -> str:
    from huggingface_hub import constants, errors

    where, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    page = f"{where}/{'datasets/' if repo.type == 'dataset' else ''}{repo.id}"
    token = "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "HF_TOKEN (not set here)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    unreached = (
        errors.OfflineModeIsEnabled,
        errors.RevisionResolutionError,
        errors.LocalEntryNotFoundError,
    )
    if isinstance(error, errors.GatedRepoError):
        said = (
            f"is gated: accept its terms at {page}, and let {token} be one of the account that did, "
            "with access to gated repositories"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        said = f"is not at {where}, or private: check its spelling, and {token} for a private one"
    elif isinstance(error, errors.RevisionNotFoundError):
        said = f"has no revision {repo.revision!r}: see {page}/tree/main"
    elif status in (401, 403):
        said = f"is refused: {where} does not take {token} ({first_line(error)})"
    elif not isinstance(error, unreached) and type(error).__name__ not in NETWORK:
        said = ""
    elif constants.HF_HUB_OFFLINE:
        said = (
            f"is not wholly in the cache {cache}, and HF_HUB_OFFLINE keeps it from being fetched: unset "
            "it, or copy the cache"
        )
    else:
        said = (
            f"is not in the cache {cache}, and {where} cannot be reached: check the network, "
            "HTTPS_PROXY, and HF_ENDPOINT for a mirror"
        )
    return said


def kept_commit(kept: dict[str, Any], repo: Repo) -> str | None:
    """The commit that a run resolved before, where it asked for the same."""
    entry = kept.get(repo.setting, {})
    same = entry.get("id") == repo.id and entry.get("asked") == repo.revision
    return entry["commit"] if same else None
