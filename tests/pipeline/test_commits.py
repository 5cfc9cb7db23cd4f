"""A run takes from a hub what its branches held when it began, on every node and when it is resumed."""

import json
from pathlib import Path

import pytest
from adapters import save_lora
from hubs import Hub
from samples import ROOT

from ray_synth.config import Config, load_config, load_run_config
from ray_synth.embedded import clip_folder, sd_folder
from ray_synth.errors import UserError
from ray_synth.generators.adapter_files import origin
from ray_synth.pipeline.commits import at_commits, find_commits, hub_repos
from ray_synth.pipeline.run import open_run
from ray_synth.storage.hub import commit_of

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The quickstart with its models on the hub."""
    models = ["generation.model=someone/digits", "meaning.clip.model=hf-hub:someone/clip"]
    return load_config(QUICKSTART, [*models, f"runs_dir={tmp_path / 'runs'}", "name=hubs"])


def test_a_resumed_run_has_the_commits_that_it_began_with(hub: Hub, config: Config):
    digits, clip = hub.add("someone/digits", sd_folder()), hub.add("someone/clip", clip_folder())
    (first,), (clip_first,) = digits.commits, clip.commits
    run = open_run(config)
    assert run.config.generation.revision == first
    assert run.config.meaning.clip.model == f"hf-hub:someone/clip@{clip_first}"
    kept = json.loads(Path(run.folder.path("models.json")).read_text())
    assert kept["generation.model"] == {"id": "someone/digits", "asked": None, "commit": first}
    assert load_run_config(run.folder).generation.revision == first  # for single images, again

    index = {**digits.commits[first]}
    second = digits.push(index)
    commit_of.cache_clear()
    asked = len(hub.requests)
    again = open_run(config)
    assert again.config.generation.revision == first and again.records.inputs == run.records.inputs
    assert [path for path in hub.requests[asked:] if second in path or "main" in path] == []
    other = open_run(config.model_copy(update={"name": "other"}))
    assert other.config.generation.revision == second
    shared = open_run(config.model_copy(update={"name": "arm"}), kept_in=run.folder)
    assert shared.config.generation.revision == first
    assert not shared.folder.exists("models.json")


def test_another_revision_is_resolved_anew(hub: Hub, config: Config):
    digits = hub.add("someone/digits", sd_folder())
    hub.add("someone/clip", clip_folder())
    run = open_run(config)
    digits.push({**next(iter(digits.commits.values()))})
    commit_of.cache_clear()
    asked = config.generation.model_copy(update={"revision": "main"})
    again = open_run(config.model_copy(update={"generation": asked}))
    assert again.config.generation.revision != run.config.generation.revision
    assert again.config.meaning.clip == run.config.meaning.clip


def test_an_adapter_has_a_commit_of_its_own_and_is_told_by_it(hub: Hub, config: Config, tmp_path):
    """A branch that moves meanwhile changes no run, and the row of each image says which it was."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(sd_folder())
    lora = hub.add("someone/lora", save_lora(pipeline, tmp_path / "one", scale=0.1))
    (first,) = lora.commits
    generation = {"model": "embedded", "adapters": [{"path": "someone/lora", "weight": 0.5}]}
    changed = config.generation.model_validate({**config.generation.model_dump(), **generation})
    clip = config.meaning.clip.model_copy(update={"model": "embedded"})
    config = config.model_copy(
        update={
            "generation": changed,
            "meaning": config.meaning.model_copy(update={"clip": clip}),
        }
    )
    run = open_run(config)
    assert [item.revision for item in run.config.generation.adapters] == [first]
    second = lora.push({"pytorch_lora_weights.safetensors": b"no LoRA"})
    commit_of.cache_clear()
    again = open_run(config)
    assert again.config.generation.adapters == run.config.generation.adapters
    assert again.records.inputs == run.records.inputs
    (told,) = origin(again.config.generation.adapters)
    assert told["revision"] == first and told["weight"] == 0.5 and len(told["sha256"]) == 64
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        open_run(config.model_copy(update={"name": "other"}))
    assert hub.downloads["pytorch_lora_weights.safetensors"] == 2
    named = {"adapters": [{"path": "someone/lora", "weight_name": "style.safetensors"}]}
    other = config.generation.model_validate({**config.generation.model_dump(), **named})
    with pytest.raises(UserError, match="'someone/lora' holds no file style.safetensors"):
        open_run(config.model_copy(update={"generation": other, "name": "third"}))
    assert second


def test_a_run_of_before_there_were_commits_goes_on_as_it_was(hub: Hub, config: Config):
    hub.add("someone/clip", clip_folder())
    embedded = config.generation.model_copy(update={"model": "embedded"})
    config = config.model_copy(update={"generation": embedded})
    run = open_run(config)
    assert run.config.meaning.clip != config.meaning.clip
    run.folder.delete("models.json")
    again = open_run(config)
    assert again.config == config and not again.folder.exists("models.json")


def test_a_gated_model_is_refused_before_anything_begins(hub: Hub, config: Config):
    hub.add("someone/digits", sd_folder(), "gated")
    with pytest.raises(UserError, match=r"generation\.model 'someone/digits' is gated: accept"):
        open_run(config)
    assert not Path(config.runs_dir, "hubs").exists()


def test_everything_that_comes_from_a_hub_is_found_and_set(config: Config):
    source = {"format": "huggingface", "path": "someone/photos"}
    values = config.model_dump(mode="json")
    values["data"] |= {"train": source, "test": {**source, "revision": "v1"}}
    values["data"]["ood"] = {"sketches": {**source, "path": "someone/sketches"}}
    values["meaning"]["llm"] |= {"model": "someone/llm", "revision": "main"}
    config = Config.model_validate(values)
    settings = [repo.setting for repo in hub_repos(config)]
    assert settings == [
        "generation.model", "meaning.llm.model", "meaning.clip.model", "data.train.path",
        "data.test.path", "data.ood.sketches.path",
    ]  # fmt: skip
    kept = {
        repo.setting: {"id": repo.id, "asked": repo.revision, "commit": f"{i}" * 40}
        for i, repo in enumerate(hub_repos(config))
    }
    commits = find_commits(config, kept)
    assert commits == kept  # and no hub was asked
    found = at_commits(config, commits)
    assert [repo.revision for repo in hub_repos(found)] == [f"{i}" * 40 for i in range(6)]
    assert at_commits(config, {}) == config
