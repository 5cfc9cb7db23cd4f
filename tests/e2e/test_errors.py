"""Bad input ends at once, with one clear message and no traceback."""

import time

import pytest
from runs import SMALL, command, run

from ray_synth.cli import main


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
        (["cluster.address=127.0.0.1:1"], "no Ray cluster to be had"),
    ],
)
def test_bad_settings_end_at_once_with_one_message(tmp_path, capsys, settings, says):
    started = time.monotonic()
    line = command("run", tmp_path, *SMALL, *settings)
    with pytest.raises(SystemExit) as ended:
        main(["run", *line[2:]])
    check_message(ended.value.code, capsys.readouterr().err, says)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("training.num_workers=500", "training needs"),
        ("cluster.num_cpus=1", "does not fit the cluster"),
    ],
)
def test_too_few_cpus_end_the_command_with_the_arithmetic(tmp_path, setting, says):
    result = run(command("run", tmp_path, *SMALL, setting), timeout=120)
    check_message(result.returncode, result.stderr, says)


def test_an_empty_class_is_named(tmp_path, image_folder, capsys):
    (image_folder / "bird").mkdir()
    source = f"{{format: imagefolder, path: {image_folder}}}"
    line = command("run", tmp_path, f"data.train={source}", f"data.test={source}", "data.ood={}")
    with pytest.raises(SystemExit) as ended:
        main(["run", *line[2:]])
    check_message(ended.value.code, capsys.readouterr().err, "bird")
