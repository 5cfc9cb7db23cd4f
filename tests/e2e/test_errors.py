"""Bad input ends at once, with one clear message and no traceback."""

import time

import pytest
from small_runs import QUICKSTART, SMALL, arguments

from ray_synth.cli.command import main


def check_message(code: int, errors: str, says: str) -> None:
    assert code == 2, errors[-3000:]
    assert says in errors
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["data.train={format: imagefolder, path: /no/such/folder}"],
            "no such folder: /no/such/folder",
        ),
        (["training.stpes=3"], "did you mean 'steps'"),
        (["generation.model=/no/such/model"], "unknown generator '/no/such/model'"),
        (["training.model=resnet5O"], "unknown timm model 'resnet5O'"),
        (["training.augment=digit"], "digits"),
        (["generation.scheduler=EulerDiscreetScheduler"], "did you mean 'EulerDiscreteScheduler'"),
        (["generation.height=100"], "multiple of 8"),
        (["runs_dir=/proc/nowhere"], "cannot write"),
        (["cluster.address=127.0.0.1:1"], "no Ray cluster available"),
    ],
)
def test_bad_settings_end_at_once_with_one_message(tmp_path, capsys, settings, says):
    started = time.monotonic()
    words = arguments("run", tmp_path, *SMALL, *settings)
    with pytest.raises(SystemExit) as ended:
        main(words)
    check_message(ended.value.code, capsys.readouterr().err, says)
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_test_set_of_pointers_ends_the_command_before_anything_is_spent(tmp_path, capsys):
    for name in ("six", "seven"):
        (tmp_path / "test" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "test" / name / f"{number}.png").write_bytes(
                b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
            )
    source = f"data.test={{format: imagefolder, path: {tmp_path / 'test'}}}"
    small = [setting for setting in SMALL if not setting.startswith("data.test")]
    with pytest.raises(SystemExit) as ended:
        main(arguments("run", tmp_path / "runs", *small, source))
    error = capsys.readouterr().err
    check_message(ended.value.code, error, "data.test: 6 of the 6 images looked at cannot be used")
    assert "seven/0.png: a Git LFS pointer, not the file itself: run `git lfs pull`" in error
    assert not list(tmp_path.rglob("meanings*"))


def test_too_few_cpus_end_the_command_with_the_arithmetic(tmp_path, capsys):
    words = arguments("run", tmp_path, *SMALL, "training.num_workers=500", "cluster.num_cpus=1")
    with pytest.raises(SystemExit) as ended:
        main(words)
    error = capsys.readouterr().err
    check_message(ended.value.code, error, "does not fit the cluster")
    assert "training needs" in error
    assert "--set cluster.num_cpus=" in error
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("prompting.negative_prompt=" + " ".join(["ugly"] * 90), "negative_prompt is too long: "),
    ],
)
def test_prompts_that_the_text_encoder_cannot_read_are_refused(setting, says):
    from ray_synth.config import load_config
    from ray_synth.prompting.plan_settings import prompt_limit

    config = load_config(QUICKSTART, [setting])
    with pytest.raises(ValueError, match=says):
        prompt_limit(config)


def test_an_empty_class_is_named(tmp_path, image_folder, capsys):
    (image_folder / "bird").mkdir()
    source = f"{{format: imagefolder, path: {image_folder}}}"
    words = arguments("run", tmp_path, f"data.train={source}", f"data.test={source}", "data.ood={}")
    with pytest.raises(SystemExit) as ended:
        main(words)
    check_message(ended.value.code, capsys.readouterr().err, "bird")
