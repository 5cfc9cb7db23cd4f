"""Commits are found and kept, files fetched once, and a hub's refusals say what to do."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hubs import TOKEN, Hub
from huggingface_hub import constants

from ray_synth.errors import UserError
from ray_synth.storage.hub import Repo, commit_of, fetch, fetched_bytes, is_hub_id, kept_commit

LLM = Repo("meaning.llm.model", "someone/llm", None, "transformers")
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 1000,
    "pytorch_model.bin": b"w" * 1000,
    "original/consolidated.pth": b"w",
    "model.gguf": b"w",
}


def test_a_branch_is_at_one_commit_and_what_was_resolved_is_what_is_fetched(hub: Hub):
    repository = hub.add("someone/llm", FILES)
    first = commit_of(LLM)
    second = repository.push({**FILES, "config.json": b'{"new": 1}'})
    assert first != second and len(first) == 40
    pinned = Repo(LLM.setting, LLM.id, first, LLM.kind)
    assert commit_of(pinned) == first
    assert Path(fetch(pinned), "config.json").read_bytes() == b"{}"
    commit_of.cache_clear()
    assert commit_of(LLM) == second


def test_a_run_keeps_what_it_asked_for():
    kept = {"meaning.llm.model": {"id": "someone/llm", "asked": None, "commit": "c" * 40}}
    assert kept_commit(kept, LLM) == "c" * 40
    assert kept_commit(kept, Repo(LLM.setting, LLM.id, "v2", LLM.kind)) is None
    assert kept_commit(kept, Repo(LLM.setting, "someone/other", None, LLM.kind)) is None


def test_each_file_is_fetched_once_and_copies_for_other_libraries_not_at_all(hub: Hub):
    hub.add("someone/llm", FILES)
    hub.seconds = 0.3
    repo = Repo(LLM.setting, LLM.id, commit_of(LLM), LLM.kind)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(fetch, [repo] * 4))
    assert len(folders) == 1
    names = {path.name for path in Path(*folders).iterdir()}
    assert names == {"config.json", "model.safetensors"}
    assert hub.downloads == {"config.json": 1, "model.safetensors": 1}
    assert fetched_bytes(repo) == 1002


def test_pickled_weights_are_fetched_where_there_are_no_others(hub: Hub):
    hub.add("someone/llm", {"config.json": b"{}", "pytorch_model.bin": b"w"})
    assert Path(fetch(LLM), "pytorch_model.bin").exists()


def test_offline_the_cache_says_the_commit(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    repository = hub.add("someone/llm", FILES)
    before = commit_of(LLM)
    fetch(Repo(LLM.setting, LLM.id, before, LLM.kind))
    repository.push({"config.json": b"new"})
    commit_of.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert commit_of(LLM) == before
    assert Path(fetch(Repo(LLM.setting, LLM.id, before, LLM.kind)), "model.safetensors").exists()
    assert len(hub.requests) == asked
    with pytest.raises(UserError, match="someone/none' is not wholly in the cache.*HF_HUB_OFFLINE"):
        commit_of(Repo(LLM.setting, "someone/none", None, LLM.kind))


def test_gated_private_and_missing_ones_say_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.add("someone/llm", FILES, "gated")
    hub.add("someone/private", FILES, "private")
    with pytest.raises(
        UserError,
        match=rf"llm' is gated: accept its terms at {hub.url}/someone/llm.*HF_TOKEN \(not",
    ):
        commit_of(LLM)
    with pytest.raises(UserError, match="gated"):
        fetch(LLM)
    for name in ("private", "mistyped"):
        with pytest.raises(UserError, match="check its spelling.*HF_TOKEN"):
            commit_of(Repo(LLM.setting, f"someone/{name}", None, LLM.kind))
    monkeypatch.setenv("HF_TOKEN", "hf_of_another_account")
    with pytest.raises(
        UserError, match="the token in HF_TOKEN be one of the account that did"
    ) as told:
        commit_of(LLM)
    assert "hf_of_another_account" not in str(told.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert commit_of(LLM) and fetch(LLM)
    assert commit_of(Repo(LLM.setting, "someone/private", None, LLM.kind))
    with pytest.raises(UserError, match="has no revision 'v9'"):
        commit_of(Repo(LLM.setting, LLM.id, "v9", LLM.kind))


def test_a_hub_that_is_not_reached_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached.*HF_ENDPOINT"):
        commit_of(LLM)


def test_ids_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("Qwen/Qwen3-8B") and is_hub_id("gpt2")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in (
        "models/mine",
        "/models/x",
        "./x",
        "~/x",
        "embedded",
        "a/b/c.gguf",
        "x.gguf",
        "s3://b/x",
    ):
        assert not is_hub_id(name), name
