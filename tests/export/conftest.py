"""A finished run for tests that hand on what it made."""

import tarfile
from pathlib import Path

import pytest
from samples import ROOT

from ray_synth.cli.command import main
from ray_synth.config import load_run_config
from ray_synth.data.dataset import load_tests, read_index
from ray_synth.storage.folder import Folder

RUNS = ROOT / "tests" / "pipeline" / "runs_0_1.tar.xz"


@pytest.fixture
def call(capsys):
    """The command with some arguments, as a shell has it: what it says, and what it complains of."""

    def run(*line: str, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*line])
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.err
        return said.out, said.err

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Folder:
    """A run of two digits that version 0.1 finished; only to be read."""
    place = tmp_path_factory.mktemp("runs")
    with tarfile.open(RUNS) as archive:
        archive.extractall(place, filter="data")
    return Folder(place / "finished")


@pytest.fixture(scope="module")
def digits(finished, tmp_path_factory) -> Path:
    """The run's own test images as files, by class: digits/six/3.png."""
    place = tmp_path_factory.mktemp("pictures") / "digits"
    config = load_run_config(finished)
    index = load_tests(config.data, ("six", "seven"), config.seed)["in_domain"]
    for at, row in enumerate(read_index(index)):
        folder = place / index.class_names[row["class_index"]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{at}.png").write_bytes(row["image"])
    return place
