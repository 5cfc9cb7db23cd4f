"""What a job takes along, and what is said of the rest."""

from pathlib import Path

import pytest

from ray_synth.cluster import includes
from ray_synth.cluster import upload as upload_module
from ray_synth.cluster.upload import gather, is_checkout
from ray_synth.config import load_config

QUICKSTART = Path(__file__).parents[2] / "jobs" / "configs" / "quickstart.yaml"


def made(tmp_path, *overrides, code=False, include=()):
    config = load_config(QUICKSTART, [f"runs_dir={tmp_path}/runs", *overrides])
    return gather(config, QUICKSTART, code=code, include=include)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_config_of_the_embedded_default_is_uploaded_alone(here):
    assert set(made(here).files) == {"config/quickstart.yaml"}


def test_small_files_go_to_the_same_place_under_the_job(here):
    (here / "lists").mkdir()
    (here / "lists" / "names.txt").write_text("six\nseven\n")
    (here / "styles.yaml").write_text("[]")
    (here / "recipe.yaml").write_text("steps: 40\n")
    upload = made(
        here, "data.class_names=lists/names.txt", "prompting.styles=./styles.yaml",
        "training.recipe=recipe.yaml",
    )  # fmt: skip
    target = here / "upload"
    upload.write(target)
    assert (target / "lists" / "names.txt").read_text() == "six\nseven\n"
    assert (target / "styles.yaml").exists() and (target / "recipe.yaml").exists()


def test_the_code_goes_along_with_its_weights_and_nothing_else(here):
    assert is_checkout()
    names = set(made(here, code=True).files)
    assert "ray_synth/cli/command.py" in names and "ray_synth/service/app.py" in names
    assert any(name.endswith("unet/diffusion_pytorch_model.safetensors") for name in names)
    assert {name.split("/")[0] for name in names} == {"config", "ray_synth"}
    assert not any("__pycache__" in name for name in names)


def test_images_by_a_relative_path_are_refused(here):
    (here / "images").mkdir()
    with pytest.raises(ValueError, match=r"data.train.path images is relative .* not uploaded"):
        made(here, "data.train={format: imagefolder, path: images}")
    with pytest.raises(ValueError, match=r"data.ood.sketches.path"):
        made(here, "data.ood={sketches: {format: imagefolder, path: images}}")


def test_absolute_paths_are_the_clusters_own_and_said(here):
    upload = made(here, "data.train={format: imagefolder, path: /shared/images}")
    assert (
        "data.train.path is a local path: /shared/images must be there on every node"
        in upload.notes
    )
    assert any(note.startswith("runs_dir is a local path") for note in upload.notes)


def test_uris_and_hub_ids_need_no_word(here):
    upload = made(
        here, "runs_dir=s3://bucket/runs", "data.train={format: imagefolder, path: s3://bucket/images}",
        "data.test={format: huggingface, path: someone/digits}", "generation.model=someone/model",
    )  # fmt: skip
    assert upload.notes == []


def test_a_relative_runs_dir_is_said(here):
    assert any("~/ray-synth/runs" in note for note in made(here, "runs_dir=runs").notes)


def test_a_model_folder_by_a_relative_path_is_refused(here):
    (here / "model").mkdir()
    with pytest.raises(ValueError, match=r"generation.model model is a relative path"):
        made(here, "generation.model=model")


@pytest.mark.parametrize("value", ["../names.txt", "a/../../names.txt"])
def test_files_outside_of_the_current_folder_are_refused(here, value):
    with pytest.raises(ValueError, match="from the current folder downwards"):
        made(here, f"data.class_names={value}")


def test_a_file_that_is_not_there_is_refused(here):
    with pytest.raises(ValueError, match="prompting.styles: no such file: styles.yaml"):
        made(here, "prompting.styles=styles.yaml")


def test_more_than_ray_takes_is_refused_with_the_largest_file(here, monkeypatch):
    monkeypatch.setattr(upload_module, "LIMIT", 1 << 20)
    (here / "plugin").mkdir()
    (here / "plugin" / "large.bin").write_bytes(bytes(2 << 20))
    with pytest.raises(ValueError, match=r"largest file is plugin/large.bin \(2.0 MiB\)"):
        made(here, include=["plugin"])


def test_what_is_uploaded_is_told_by_name_and_size(here):
    (here / "plugin.py").write_text("x = 1\n" * 1000)
    lines = made(here, code=True, include=["plugin.py"]).describe()
    assert "uploads plugin.py (5.9 KiB)" in lines
    assert any(line.startswith("uploads ray-synth ") for line in lines)


SECRET = "hush-of-a-test"
PEM = "-----BEGIN " + "RSA PRIVATE KEY-----\n"
STAYS = {
    ".env": "credentials", "prod.env": "credentials", ".netrc": "credentials", "a/.aws/credentials": "",
    ".ssh/id_rsa": "", "id_ed25519": "credentials", "a/server.pem": "credentials", ".git/config": "",
    "credentials.json": "credentials", "a/my-service-account.json": "credentials",
    "deploy": "a private key or a token is in it", "notes.ipynb": "a private key or a token is in it",
    "secrets.toml": "credentials", ".config/gcloud/x.db": "", ".hidden": "hidden",
    "venv2/lib/x.py": "", "old/plan.parquet": "", "results/run/images/part-0.parquet": "",
    "mlruns/0/meta.yaml": "", "a/__pycache__/x.pyc": "", "terraform.tfstate": "credentials",
    "kubeconfig": "credentials",
}  # fmt: skip
GOES = [
    "plugin.py",
    "a/b/model.py",
    "a/credentials.py",
    "data/names.txt",
    "key_words.txt",
    "a/linked.py",
]


def test_a_whole_folder_goes_without_its_secrets_and_its_links_out(here, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "passwd").write_text(SECRET)
    for name in [*STAYS, *GOES[:-1], "venv2/pyvenv.cfg", "old/config.yaml"]:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(SECRET if name in STAYS else "x = 1")
    (here / "deploy").write_text(PEM)
    (here / "notes.ipynb").write_text('{"token": "hf_' + "a" * 30 + '"}')
    (here / "a" / "linked.py").symlink_to(here / "plugin.py")
    (here / "a" / "alias").symlink_to(here / ".env")
    (here / "a" / "loop").symlink_to(here)
    (here / "a" / "b" / "up").symlink_to(here / "a")
    (here / "etc").symlink_to(outside)
    (here / "one").symlink_to(outside / "passwd")
    (here / "gone").symlink_to(here / "nowhere")
    upload = made(here, f"runs_dir={here}/results", include=["."])
    assert set(upload.files) == {"config/quickstart.yaml", *GOES}
    upload.write(here.parent / "uploaded")
    for path in (here.parent / "uploaded").rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or SECRET not in path.read_text()
    told = dict(upload.left_out)
    for name, why in STAYS.items():
        assert not why or told[name] == why
    assert told["etc/"] == told["one"] == "a link out of the folder"
    assert told["a/loop/"] == told["a/b/up/"] == "a link in a circle"
    assert told["a/alias"] == "credentials"
    assert told["venv2/"] == "a virtual environment"
    assert told["old/"] == "a run"
    assert "left out: .env (credentials)" in upload.describe()


@pytest.mark.parametrize("name", [".env", "keys/id_rsa", "plain", ".aws"])
def test_credentials_that_are_named_are_refused(here, name):
    path = here / name / "credentials" if name == ".aws" else here / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(PEM)
    with pytest.raises(ValueError, match=f"--include {name}: it holds credentials.*--env NAME"):
        made(here, include=[name])


def test_a_folder_that_is_a_link_out_is_refused(here):
    (here / "etc").symlink_to("/etc")
    with pytest.raises(ValueError, match="a link to /etc, which is outside"):
        made(here, include=["etc"])


def test_a_folder_of_too_many_files_ends_at_once(here, monkeypatch):
    monkeypatch.setattr(includes, "MOST_FILES", 100)
    (here / "data").mkdir()
    for i in range(60):
        (here / "data" / f"{i}.txt").write_text("x")
    lines = made(here, include=["data"]).describe()
    assert len([line for line in lines if line.startswith("uploads data/")]) == 39
    assert "uploads 21 smaller files (0.0 KiB)" in lines
    (here / "data" / "more").mkdir()
    for i in range(9):  # links inside are followed: each in each other would be 9! folders
        (here / "data" / "more" / f"{i}").mkdir()
        for j in range(9):
            (here / "data" / "more" / f"{i}" / f"to{j}").symlink_to(here / "data" / "more" / f"{j}")
    with pytest.raises(ValueError, match=r"--include data: more than 100 files and folders"):
        made(here, include=["data"])
