"""A run's images and model on a hub of this machine, by the hub's own client."""

import io
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import timm
import torch
from hubs import TOKEN, Hub
from huggingface_hub import DatasetCard, ModelCard, _upload_pipeline, constants
from PIL import Image
from test_layouts import image_rows, write_plan, write_store

from ray_synth.export import push as pushing
from ray_synth.export.comparison import check_pixels
from ray_synth.export.layouts import export_images
from ray_synth.export.weights import choose_weights
from ray_synth.storage.folder import Folder

IMAGES, MODEL = "datasets/me/digits", "me/digits"


@pytest.fixture
def run(finished, tmp_path) -> Folder:
    return Folder(shutil.copytree(finished.uri, tmp_path / "run"))


@pytest.fixture
def owned(hub: Hub, monkeypatch) -> Hub:
    """The hub, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def files(hub: Hub, name: str) -> dict[str, bytes]:
    found = dict(list(hub.repositories[name].commits.values())[-1])
    found.pop(".gitattributes", None)
    return found


def rows(hub: Hub, name: str = IMAGES) -> list[dict]:
    shards = [data for file, data in sorted(files(hub, name).items()) if file.startswith("data/")]
    return [row for data in shards for row in pq.read_table(io.BytesIO(data)).to_pylist()]


def test_what_is_pushed_is_private_and_loads_from_the_hub(run, owned, call, digits):
    out, err = call("push", run.uri, "me/digits", "--licence", "cc-by-4.0")
    assert out.splitlines() == [
        f"pushed images to {owned.url}/datasets/me/digits",
        f"pushed model to {owned.url}/me/digits",
    ]
    assert "32 images of 2 classes" in err
    assert owned.repositories.keys() == {IMAGES, MODEL}
    assert {repository.access for repository in owned.repositories.values()} == {"private"}
    assert [*files(owned, MODEL)] == ["README.md", "config.json", "model.safetensors"]
    assert [*files(owned, IMAGES)] == ["README.md", "data/train-00000.parquet"]
    assert not Path(run.uri, "push").exists()
    everything = [data for name in owned.repositories for data in files(owned, name).values()]
    assert not [data for data in everything if TOKEN.encode() in data or run.uri.encode() in data]
    assert TOKEN not in out + err

    model = timm.create_model("hf-hub:me/digits", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["six", "seven"]
    pixels, _ = check_pixels(choose_weights(run), [str(digits)])
    images = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        torch.testing.assert_close(model(images), choose_weights(run).load()(images))
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with Image.open(next((digits / "six").iterdir())) as picture:
        assert prepare(picture.convert("RGB")).shape == (3, 32, 32), "as the card says"

    found = rows(owned)
    assert len(found) == 32
    assert {row["class_name"] for row in found} == {"six", "seven"}
    assert all(row["accepted"] for row in found)
    with Image.open(io.BytesIO(found[0]["image"]["bytes"])) as picture:
        assert picture.mode == "RGB"


def test_the_cards_say_what_was_scored_and_how_it_was_made(run, owned, call):
    call("push", run.uri, "me/digits", "--weights", "mixed.aux")
    card = ModelCard(files(owned, MODEL)["README.md"].decode())
    metrics = run.read_json("metrics.json")
    tested = metrics["mixed"]["aux"]
    assert card.data.library_name == "timm"
    assert {"ray-synth", "timm"} <= {*card.data.tags}
    scored = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert scored == {
        "in domain": tested["in_domain"]["top1"] / 100,
        "uci_digits (OOD)": tested["ood"]["uci_digits"]["top1"] / 100,
    }
    assert "8 real images and 32 synthetic ones" in card.text
    assert "with the auxiliary BN" in card.text
    assert "auxiliary BN (**this one**) | in domain | 40 | 60.0 |" in card.text
    assert 'timm.create_model("hf-hub:me/digits", pretrained=True)' in card.text
    assert f"[me/digits]({owned.url}/datasets/me/digits)" in card.text
    assert "| Generator | embedded |" in card.text
    assert "generator: embedded in ray-synth" in card.text
    assert "No licence was chosen" in card.text
    data = DatasetCard(files(owned, IMAGES)["README.md"].decode())
    assert "32 synthetic images of 2 classes" in data.text


def test_rejected_images_stay_at_home(owned, tmp_path, call):
    run = Folder(tmp_path / "small")
    made = image_rows()
    write_plan(run, made)
    write_store(run, made)
    run.write_json("stages/generation.json", {})
    run.write_yaml("config.yaml", {"name": "small"})
    out, _ = call("push", run.uri, "me/digits", "--only", "images", "--dry-run")
    assert "20 images of 3 classes" in out
    assert "4 rejected ones are left out" in out
    call("push", run.uri, "me/digits", "--only", "images")
    assert owned.repositories.keys() == {IMAGES}
    assert {row["sample_id"] for row in rows(owned)} == {
        row["sample_id"] for row in made if row["accepted"]
    }


def test_a_push_that_broke_off_goes_on_with_what_is_missing(run, owned, call, monkeypatch):
    """Commits of one file each; the third is refused."""
    monkeypatch.setattr(_upload_pipeline, "REGULAR_CONTENT_BYTES_BUDGET", 1)
    monkeypatch.setattr(pushing, "export_images", partial(export_images, shard_rows=8))
    owned.failing = [0, 0, 400]
    _, err = call("push", run.uri, "me/digits", "--only", "images", code=2)
    assert "refuses to take me/digits" in err
    assert "the same command continues" in err
    assert [*files(owned, IMAGES)] == ["README.md", "data/train-00000.parquet"]
    assert Path(run.uri, "push", "dataset", "data", "train-00003.parquet").exists()
    call("push", run.uri, "me/digits", "--only", "images")
    names = ["README.md", *(f"data/train-{shard:05d}.parquet" for shard in range(4))]
    assert [*files(owned, IMAGES)] == names
    assert sorted(owned.uploads) == names, "each was sent once"
    assert len(rows(owned)) == 32
    assert not Path(run.uri, "push").exists()


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the hub's own client
def test_large_files_are_sent_once_without_the_hubs_own_protocol(run, owned, call, monkeypatch):
    """As to a hub without Xet: Git LFS, which says what it has."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    owned.large = 20_000
    call("push", run.uri, "me/digits")
    assert len(owned.objects) == 2
    assert len(rows(owned)) == 32
    sent = list(owned.uploads)
    call("push", run.uri, "me/digits")
    assert owned.uploads == sent, "nothing has changed"


def test_a_push_replaces_what_the_one_before_had_and_nothing_else(run, owned, call):
    call("push", run.uri, "me/digits", "--only", "images")
    before = files(owned, IMAGES)
    owned.repositories[IMAGES].push(
        {**before, "data/train-00001.parquet": b"of before", "LICENSE": b"mine"}
    )
    call("push", run.uri, "me/digits", "--only", "images")
    assert files(owned, IMAGES) == {**before, "LICENSE": b"mine"}


def test_what_a_hub_would_refuse_or_lose_is_told_before_anything_is_sent(
    run, hub, call, monkeypatch
):
    def refused(said: str, *options: str, repo: str = "me/digits") -> None:
        _, err = call("push", run.uri, repo, *options, code=2)
        assert said in err
        assert TOKEN not in err
        assert not Path(run.uri, "push").exists()
        assert not hub.uploads

    for name in ("digits", "me/digits/more", "me/..", "me/a b"):
        refused("names no repository: give OWNER/NAME", repo=name)
    refused("--only 'all': one of images, model", "--only", "all")
    refused("--weights goes with the model", "--only", "images", "--weights", "mixed.main")
    assert hub.requests == []
    refused("wants a token to be written to: set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrongwrongwrong")
    refused("does not let this token write to me/digits")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("me/digits", {"README.md": b"---\ntags: [mine]\n---\n"}, access="private")
    refused("holds what no run has pushed, and README.md would be replaced", "--only", "model")
    hub.repositories["me/digits"].access = "public"
    refused("is public, and all could see what is pushed there: say --public")
    refused("does not let this token write to other/digits", repo="other/digits")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("http://127.0.0.1:9 cannot be reached")


def test_public_is_what_was_asked_for_alone(run, owned, call):
    out, err = call("push", run.uri, "me/digits", "--public", "--only", "model")
    assert owned.repositories[MODEL].access == "public"
    assert "for everybody to see" in err
    call("push", run.uri, "me/digits", "--public", "--only", "model")
    owned.repositories[MODEL].access = "private"
    out, _ = call("push", run.uri, "me/digits", "--public", "--only", "model")
    assert "is private and stays so" in out


def test_a_dry_run_asks_no_hub_and_writes_nothing(run, hub, call):
    before = sorted(Path(run.uri).rglob("*"))
    out, _ = call("push", run.uri, "me/digits", "--dry-run")
    assert f"images to {hub.url}/datasets/me/digits, private: 32 images of 2 classes" in out
    assert "mixed.main (resnetv2_18, 2 classes): README.md, config.json, model.safetensors" in out
    assert "no token yet: set HF_TOKEN" in out
    assert hub.requests == []
    assert sorted(Path(run.uri).rglob("*")) == before


def test_an_unfinished_run_is_not_pushed(run, hub, call, tmp_path):
    run.delete("stages/generation.json")
    _, err = call("push", run.uri, "me/digits", code=2)
    assert "has not made all its images" in err
    out, _ = call("push", run.uri, "me/digits", "--only", "model", "--dry-run")
    assert "images to" not in out
    _, err = call("push", str(tmp_path / "none"), "me/digits", code=2)
    assert "no run at" in err
    assert huggingface_hub.get_token() is None
