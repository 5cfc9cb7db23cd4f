"""`ray-synth init` and `ray-synth doctor`, on a stranger's folder."""

import shutil

import pytest
from typer.testing import CliRunner

from ray_synth.cli import doctor
from ray_synth.cli.command import app
from ray_synth.cli.setup import write_config
from ray_synth.config import GenerationConfig, load_config
from ray_synth.errors import UserError
from ray_synth.generators.registry import advise
from ray_synth.pipeline import runner
from ray_synth.pipeline.run import open_run


@pytest.fixture
def split_folder(image_folder):
    shutil.copytree(image_folder, image_folder.parent / "set" / "train")
    shutil.copytree(image_folder, image_folder.parent / "set" / "test")
    return image_folder.parent / "set"


def test_init_writes_a_config_that_opens(split_folder, tmp_path):
    out = tmp_path / "my.yaml"
    result = CliRunner().invoke(app, ["init", "--images", str(split_folder), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "2 classes, 10 training images" in result.output
    config = load_config(out, [f"runs_dir={tmp_path / 'runs'}"])
    run = open_run(config)
    assert run.train.class_names == ("cat", "dog")
    assert len(run.tests["in_domain"]) == 10


def test_doctor_and_run_tell_what_is_left_out(split_folder, tmp_path, monkeypatch, caplog):
    (split_folder / "test" / "cat").rename(split_folder / "test" / "Cat")
    out = tmp_path / "my.yaml"
    write_config(split_folder, out)
    config = load_config(out, [f"runs_dir={tmp_path / 'runs'}", "tracking.enabled=false"])
    said = (
        "data.test: 5 images are left out, since their label is no class: 'Cat' (5 images; did you"
    )
    sizes, wrong, told = doctor._sizes(config)
    assert (sizes.real, wrong) == (10, [])
    assert told[0].startswith(said)

    def no_cluster(_):
        raise UserError("far enough")

    monkeypatch.setattr(runner, "connect", no_cluster)
    with pytest.raises(UserError, match="far enough"):
        runner.run_pipeline(config)
    assert any(record.getMessage().startswith(said) for record in caplog.records)


def test_init_wants_test_images_and_never_overwrites(image_folder, split_folder, tmp_path):
    with pytest.raises(ValueError, match="no test images"):
        write_config(image_folder, tmp_path / "a.yaml")
    write_config(split_folder, tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="exists already"):
        write_config(split_folder, tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="no such folder"):
        write_config(tmp_path / "none", tmp_path / "b.yaml")


def test_init_on_photographs_without_a_gpu_says_what_to_take_instead(split_folder, tmp_path):
    out = tmp_path / "my.yaml"
    result = CliRunner().invoke(app, ["init", "--images", str(split_folder), "--out", str(out)])
    assert "(5 of each class)" in result.output
    text = " ".join(result.output.split())
    assert "embedded models know digits and little else: their images of 'cat', 'dog' will" in text
    assert "generation.generator: endpoint" in text
    assert "stable-diffusion-v1-5" in text


@pytest.mark.parametrize(
    ("names", "warned"),
    [(("six", "seven"), False), (("0", "digit_9", "the number 7"), False), (("cat", "7"), True)],
)
def test_a_run_says_before_anything_that_the_embedded_models_do_not_know_a_class(
    names, warned, caplog
):
    with caplog.at_level("WARNING", "ray_synth"):
        advise(GenerationConfig(), "", names)
        advise(GenerationConfig(generator="glyphs", model="x"), "", ("cat",))
    assert ("know digits and little else" in caplog.text) is warned
    assert caplog.text.count("Nothing has been spent yet") == warned


def test_doctor_says_what_there_is_and_what_does_not_fit(local_ray):
    config = "jobs/configs/quickstart.yaml"
    good = CliRunner().invoke(app, ["doctor", "--config", config])
    assert good.exit_code == 0, good.output
    for expected in (
        "torch ",
        "CPU: ",
        "cluster: 1 node",
        "training    2 CPUs, 0 GPUs",
        "the config fits",
    ):
        assert expected in good.output
    bad = CliRunner().invoke(
        app, ["doctor", "--config", config, "--set", "training.num_workers=99"]
    )
    assert bad.exit_code == 1
    assert "does not fit: training needs" in bad.output


def test_runs_go_home_from_an_uploaded_job(monkeypatch, tmp_path):
    from ray_synth.cluster.connection import runs_folder

    upload = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    upload.mkdir(parents=True)
    monkeypatch.chdir(upload)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert runs_folder("runs").uri == str(tmp_path / "home" / "ray-synth" / "runs")
    assert runs_folder("/shared/runs").uri == "/shared/runs"
    assert runs_folder("s3://b/runs").uri == "s3://b/runs"
