"""Bad input ends at once, with one clear message and no traceback."""

import time

import pytest
from runs import SMALL, command, run


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
        (["training.num_workers=500"], "training needs"),
        (["cluster.num_cpus=1"], "does not fit the cluster"),
        (["cluster.address=127.0.0.1:1"], "no Ray cluster to be had"),
    ],
)
def test_bad_settings_end_at_once_with_one_message(tmp_path, settings, says):
    started = time.monotonic()
    result = run(command("run", tmp_path, *SMALL, *settings), timeout=120)
    assert result.returncode == 2, result.stderr[-3000:]
    assert says in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert time.monotonic() - started < 60


def test_an_empty_class_is_named(tmp_path, image_folder):
    (image_folder / "bird").mkdir()
    source = f"{{format: imagefolder, path: {image_folder}}}"
    line = command("run", tmp_path, f"data.train={source}", f"data.test={source}", "data.ood={}")
    result = run(line)
    assert result.returncode == 2
    assert "bird" in result.stderr
    assert "Traceback" not in result.stderr
