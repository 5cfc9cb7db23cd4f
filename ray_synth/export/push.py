"""A run's images and its model to a Hugging Face hub, by the hub's own client: private unless asked.

A finished run in; a data set and a model with their cards on the hub out. Files are put together in a
folder first, and go up in parts; the same push again sends what the hub lacks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray_synth
from ray_synth.errors import UserError, causes, first_line
from ray_synth.export.classifier import FILES
from ray_synth.export.layouts import export_images
from ray_synth.export.model_card import model_card
from ray_synth.export.model_export import export_model
from ray_synth.export.weights import Weights, choose_weights
from ray_synth.generation.selection import choose, count_by, scan
from ray_synth.generation.store import ImageStore
from ray_synth.storage.folder import Folder
from ray_synth.storage.hub import NETWORK
from ray_synth.storage.secrets import redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

README = "README.md"
# What is sent of a folder, and what of an earlier push is deleted where it is not sent again.
SENT = {
    "dataset": [README, "data/train-*.parquet"],
    "model": [README, "config.json", FILES["timm"]],
}
STALE = {"dataset": ["data/train-[0-9][0-9][0-9][0-9][0-9].parquet"], "model": None}
NO_TOKEN = (
    "set HF_TOKEN to one that may write (the hub's settings, Access Tokens), or `hf auth login`"
)
AGAIN = "What was sent is kept: the same command continues"
BROKEN_OFF = (
    *NETWORK,
    "RemoteProtocolError",
    "ReadError",
    "WriteError",
    "WriteTimeout",
)  # of httpx
PARTS = {"images": "dataset", "model": "model"}


@dataclass(frozen=True)
class Push:
    """What is pushed from where to where; nothing of it is done yet.

    Attributes:
        repo: OWNER/NAME, of the data set and of the model: a hub keeps the two apart.
        kinds: of `dataset` and `model`.
        weights: the model; None where it is not pushed.
        staging: where files are put together; `kept`: it stays when all is done.
    """

    run: Folder
    repo: str
    kinds: list[str]
    weights: Weights | None
    public: bool
    licence: str | None
    staging: Path
    kept: bool

    @classmethod
    def of(
        cls,
        run: Folder,
        repo: str,
        *,
        only: str | None = None,
        weights: str | None = None,
        public: bool = False,
        licence: str | None = None,
        staging: Path | None = None,
    ) -> Push:
        """Look at the run and the names; no hub is asked.

        Raises:
            UserError: no such run, it is not finished, or a name that no repository may have.
        """
        run.check_readable()
        _check_names(repo, only)
        if not run.exists("config.yaml"):
            raise UserError(f"no run at {run.address()}: it has no config.yaml")
        kinds = [PARTS[part] for part in PARTS if only in (None, part)]
        if "dataset" in kinds and not run.exists("stages/generation.json"):
            raise UserError(
                f"{run.address()} has not made all its images: let `ray-synth run` finish it, or push "
                "--only model"
            )
        chosen = choose_weights(run, weights) if "model" in kinds else None
        if weights and chosen is None:
            raise UserError("--weights goes with the model, and --only images leaves it out")
        own = Path(run.uri, "push") if run.is_local else Path(f"{run.name}.push")
        place = staging.expanduser() if staging else own
        return cls(run, repo, kinds, chosen, public, licence, place, staging is not None)

    def push(self) -> Iterator[str]:
        """Do it; a line for people as each part is there.

        Raises:
            UserError: there is no token, or it may not; the hub is not reached; or the repository is
                public or holds what is not of a run. What was sent is kept.
        """
        from huggingface_hub import HfApi

        api = HfApi(library_name="ray-synth", library_version=ray_synth.__version__)
        with hub_work(self.repo):
            _require_token(api)
            there = {kind: self._look(api, kind) for kind in self.kinds}
            for kind in self.kinds:
                if there[kind] == "absent":
                    api.create_repo(self.repo, repo_type=kind, private=not self.public)
        for kind in self.kinds:
            if self.public and there[kind] == "private":
                yield f"note: {self.address(kind)} is private and stays so: its page can change that"
            folder = self.staging / kind
            self._put_together(kind, Folder(folder))
            with hub_work(self.repo):
                api.upload_folder(
                    repo_id=self.repo,
                    repo_type=kind,
                    folder_path=folder,
                    allow_patterns=SENT[kind],
                    delete_patterns=STALE[kind],
                    commit_message=f"{_named(kind)} of run {self.run.name}",
                )
            if not self.kept:
                shutil.rmtree(folder)
            yield f"pushed {_named(kind).lower()} to {self.address(kind)}"
        if not self.kept:
            Folder(self.staging).remove_empty()

    def address(self, kind: str) -> str:
        """Of its page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{self.repo}"

    def _put_together(self, kind: str, to: Folder) -> None:
        if kind == "dataset":
            export_images(self.run, to, layout="huggingface", licence=self.licence)
            return
        assert self.weights is not None
        export_model(self.weights, to, form="timm")
        images = self.address("dataset") if "dataset" in self.kinds else None
        card = model_card(self.weights, self.repo, licence=self.licence, images_url=images)
        to.write_bytes(README, card.encode())

    def _look(self, api: HfApi, kind: str) -> str:
        """`absent`, `private` or `public`: what is there before.

        Raises:
            UserError: it is public and may not be, or has files that would be lost.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = api.repo_info(self.repo, repo_type=kind)
        except RepositoryNotFoundError:
            return "absent"
        if not info.private and not self.public:
            raise UserError(
                f"{self.address(kind)} is public, and all could see what is pushed there: say --public, "
                "or push to another"
            )
        names = {found.rfilename for found in getattr(info, "siblings", None) or ()}
        lost = [name for name in sorted(names) if _matches(name, SENT[kind])]
        if lost and not self._is_of_a_run(api, kind, README in names):
            raise UserError(
                f"{self.address(kind)} holds what no run has pushed, and {lost[0]} would be replaced: "
                "push to another repository"
            )
        return "private" if info.private else "public"

    def _is_of_a_run(self, api: HfApi, kind: str, has_card: bool) -> bool:
        from huggingface_hub import RepoCard

        if not has_card:
            return False
        path = api.hf_hub_download(self.repo, README, repo_type=kind)
        try:
            tags = RepoCard(Path(path).read_text("utf-8"), True).data.to_dict().get("tags")
        except (ValueError, TypeError):
            return False
        return isinstance(tags, list) and "ray-synth" in tags


def describe(wanted: Push) -> list[str]:
    """What would be pushed, and where to, for people; no hub is asked."""
    from huggingface_hub import get_token

    seen = "for everybody to see" if wanted.public else "private"
    lines = [
        f"{_named(kind).lower()} to {wanted.address(kind)}, {seen}: {_contents(wanted, kind)}"
        for kind in wanted.kinds
    ]
    lines.append(f"put together in {wanted.staging}" + ("" if wanted.kept else ", which then goes"))
    if get_token() is None:
        lines.append("no token yet: " + NO_TOKEN)
    return lines


def _contents(wanted: Push, kind: str) -> str:
    if kind == "model":
        assert wanted.weights is not None
        card = wanted.weights.card
        return (
            f"{wanted.weights.name} ({card['model']}, {len(card['class_names'])} classes): "
            f"{', '.join(SENT['model'])}"
        )
    facts = scan(wanted.run)
    states = count_by(facts, "accepted")
    classes = len(count_by(choose(facts, rejected=False), "class_index"))
    stored = ImageStore(wanted.run.child("images")).folder.stamps().values()
    size = sum(size for size, _ in stored) / 1e6
    return (
        f"{states.get(True, 0):,} images of {classes} classes, as Parquet with a card, at most about "
        f"{size:,.1f} MB; {states.get(False, 0):,} rejected ones are left out"
    )


def _named(kind: str) -> str:
    return "Images" if kind == "dataset" else "Model"


def _matches(name: str, patterns: list[str]) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_names(repo: str, only: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if only not in (None, *PARTS):
        raise UserError(f"--only {only!r}: one of {', '.join(PARTS)}, or leave it out for both")
    try:
        validate_repo_id(repo)
        fits = "/" in repo
    except HFValidationError:
        fits = False
    if not fits:
        raise UserError(
            f"{redact(repo)!r} names no repository: give OWNER/NAME, such as me/cranes, of letters, "
            "digits and -_."
        )


def _require_token(api: HfApi) -> None:
    from huggingface_hub import constants, get_token

    if get_token() is None:
        raise UserError(f"{constants.ENDPOINT} wants a token to be written to: {NO_TOKEN}")
    api.whoami()


@contextmanager
def hub_work(repo: str) -> Iterator[None]:
    """A block that asks a hub to do something. Raises UserError for what it refuses, and why."""
    from huggingface_hub import constants

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if said := _said(error, repo, constants.ENDPOINT):
            raise UserError(said) from None
        raise


def _said(error: Exception, repo: str, where: str) -> str:
    """What a hub's error, or that which it follows from, means; empty for what is no failure of a hub."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in causes(error):
        reason = redact(first_line(cause))
        if isinstance(cause, HfHubHTTPError):
            if getattr(cause.response, "status_code", None) in (401, 403):
                return (
                    f"{where} does not let this token write to {repo} ({reason}): {NO_TOKEN}; and be the "
                    "owner, or of the organisation"
                )
            return f"{where} refuses to take {repo} ({reason}). {AGAIN}"
        if type(cause).__name__ in BROKEN_OFF or type(cause).__module__.startswith("hf_xet"):
            return (
                f"{where} cannot be reached ({reason}): check the network, HTTPS_PROXY, and HF_ENDPOINT "
                f"for another hub. {AGAIN}"
            )
    return ""
