"""Models and data of the hub: each is at one commit for a whole run, whatever its branch does meanwhile.

A config comes in; the same config with commits for revisions comes out, and what models.json keeps.
"""

from __future__ import annotations

import logging
from typing import Any

from ray_synth.config import Config, SourceConfig
from ray_synth.generators.adapter_files import adapter_repos
from ray_synth.storage.folder import Folder
from ray_synth.storage.hub import MODELS, Repo, commit_of, is_hub_id, kept_commit, open_clip_repo

log = logging.getLogger("ray_synth")


def hub_repos(config: Config) -> list[Repo]:
    """All that a run takes from the hub by id, by the settings that name it."""
    found = []
    generation, llm, clip = config.generation, config.meaning.llm, config.meaning.clip
    if generation.generator == "diffusers" and is_hub_id(generation.model):
        found.append(
            Repo(
                "generation.model", generation.model, generation.revision, "diffusers",
                generation.variant,
            )
        )  # fmt: skip
    if generation.generator == "diffusers":
        found += adapter_repos(generation.adapters)
    if llm.backend == "transformers" and is_hub_id(llm.model):
        found.append(Repo("meaning.llm.model", llm.model, llm.revision, "transformers"))
    if clip.model.startswith("hf-hub:"):
        found.append(open_clip_repo(clip.model))
    sources = {"train": config.data.train, "test": config.data.test}
    sources |= {f"ood.{name}": source for name, source in config.data.ood.items()}
    for name, source in sources.items():
        if source.format == "huggingface" and is_hub_id(str(source.path)):
            found.append(Repo(f"data.{name}.path", str(source.path), source.revision, "dataset"))
    return found


def read_commits(folder: Folder) -> dict[str, Any]:
    """What a run (or the workspace of studies) keeps; empty where it has resolved nothing."""
    return folder.read_json(MODELS) if folder.exists(MODELS) else {}


def find_commits(
    config: Config, kept: dict[str, Any], only: tuple[str, ...] = ("",)
) -> dict[str, Any]:
    """setting -> `{id, asked, commit}`; those kept are kept, of the others the hub is asked.

    Args:
        only: what the names of settings begin with; others are left out.

    Raises:
        UserError: a repository cannot be used; says why, and what to do.
    """
    found = {}
    for repo in hub_repos(config):
        if not repo.setting.startswith(only):
            continue
        commit = kept_commit(kept, repo) or commit_of(repo)
        found[repo.setting] = {"id": repo.id, "asked": repo.revision, "commit": commit}
        if repo.setting not in kept and commit != repo.revision:
            log.info("%s %s is at commit %s", repo.setting, repo.id, commit[:12])
    return {**kept, **found}


def at_commits(config: Config, commits: dict[str, Any]) -> Config:
    """The config whose revisions are these commits."""

    def source(name: str, given: SourceConfig) -> SourceConfig:
        return given.model_copy(update=_revision(commits, f"data.{name}.path", given.revision))

    data, meaning, clip = config.data, config.meaning, config.meaning.clip
    if "meaning.clip.model" in commits:
        entry = commits["meaning.clip.model"]
        clip = clip.model_copy(update={"model": f"hf-hub:{entry['id']}@{entry['commit']}"})
    llm = meaning.llm.model_copy(
        update=_revision(commits, "meaning.llm.model", meaning.llm.revision)
    )
    generation = config.generation.model_copy(
        update={
            **_revision(commits, "generation.model", config.generation.revision),
            "adapters": [
                item.model_copy(
                    update=_revision(commits, f"generation.adapters.{at}", item.revision)
                )
                for at, item in enumerate(config.generation.adapters)
            ],
        }
    )
    sources = {
        "train": source("train", data.train),
        "test": source("test", data.test),
        "ood": {name: source(f"ood.{name}", given) for name, given in data.ood.items()},
    }
    return config.model_copy(
        update={
            "data": data.model_copy(update=sources),
            "meaning": meaning.model_copy(update={"llm": llm, "clip": clip}),
            "generation": generation,
        }
    )


def fetch_generator(config: Config) -> None:
    """The files of the generator, its adapters and the CLIP that judges, on every node of the pool.

    Raises:
        UserError: a node cannot fetch them.
    """
    from ray_synth.cluster.downloads import fetch_on_nodes

    checks, generation = config.generation.checks, config.generation
    wanted = {"generation.model"}
    if checks.need_clip:
        wanted.add("meaning.clip.model")
    repos = [repo for repo in hub_repos(config) if repo.setting in wanted or repo.kind == "adapter"]
    fetch_on_nodes(repos, num_cpus=generation.num_cpus, num_gpus=generation.num_gpus)


def _revision(commits: dict[str, Any], setting: str, asked: str | None) -> dict[str, Any]:
    return {"revision": commits[setting]["commit"] if setting in commits else asked}
