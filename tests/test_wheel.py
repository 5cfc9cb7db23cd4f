"""The wheel is one package with all that it reads, and works where there is no checkout."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from samples import ROOT
from service import ask, free_port

CARRIED = (
    "cli/command.py",
    "embedded/MODEL_CARD.md",
    "embedded/weights/clip/open_clip_model.safetensors",
    "embedded/weights/sd/unet/diffusion_pytorch_model.safetensors",
    "export/card.md.j2",
    "prompting/contexts.yaml",
    "prompting/styles.yaml",
    "report/page.html.j2",
    "service/page.html",
    "studies/page.html.j2",
    "training/recipes/resnet50_a2.yaml",
)
NOT_OURS = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "mlruns", "runs", "mlflow.db"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, without a download: what pip and setuptools make of pyproject.toml."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_OURS)
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--no-index", "--wheel-dir", folder, folder / "checkout",
        ],
        check=True, timeout=300,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the wheel's content comes before the checkout."""
    folder = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(folder)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture
def serve_config(tmp_path: Path) -> Path:
    """The operator's copy of serve/config.yaml, on a port that is free."""
    values = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    values["http_options"]["port"] = free_port()
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def ray_synth(env: dict[str, str], cwd: Path, *words: str) -> str:
    line = [sys.executable, "-m", "ray_synth.cli", *words]
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_installs_one_package_with_all_that_it_reads(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ray_synth"}
    assert len(tops) == 2
    assert {f"ray_synth/{name}" for name in CARRIED} <= set(names)


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    listed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("ray_synth/")}
    files = (path for path in (ROOT / "ray_synth").rglob("*") if path.is_file())
    assert listed == {
        path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts
    }


def test_its_command_works_without_a_checkout(
    installed: dict[str, str], serve_config: Path, tmp_path: Path
) -> None:
    where = [sys.executable, "-c", "import ray_synth; print(ray_synth.__file__, end='')"]
    found = subprocess.check_output(where, cwd=tmp_path, env=installed, text=True)
    assert Path(found).parents[1] == Path(installed["PYTHONPATH"])
    assert "disambiguate" in ray_synth(installed, tmp_path, "--help")
    assert "nothing is wrong with it" in ray_synth(
        installed, tmp_path, "serve", "check", str(serve_config)
    )


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["installed", "checkout"])
@pytest.mark.parametrize("command", [["ray_synth.cli", "serve"], ["ray.serve.scripts"]])
def test_serve_run_answers(
    installed: dict[str, str], serve_config: Path, tmp_path: Path, folder: str, command: list[str]
) -> None:
    """By `ray-synth serve run` and by Ray's own `serve run`, from the wheel and from a checkout."""
    env, cwd = {**installed, "RAY_ADDRESS": "local"}, tmp_path
    if folder == "checkout":
        del env["PYTHONPATH"]
        cwd = ROOT
    port = yaml.safe_load(serve_config.read_text())["http_options"]["port"]
    with (tmp_path / "log.txt").open("w") as log:
        serving = subprocess.Popen(
            [sys.executable, "-m", *command, "run", str(serve_config)],
            cwd=cwd, env=env, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not _is_ready(f"http://127.0.0.1:{port}"):
            assert serving.poll() is None and time.monotonic() < deadline, log_of(tmp_path)
            time.sleep(1)
        body = {"class_name": "seven", "context": "a list of numbers", "meanings": ["the number 7"]}
        status, answer = ask(
            f"http://127.0.0.1:{port}", "/disambiguate", {**body, "num_meanings": 0}
        )
        assert (status, answer["choice"]) == (200, "the number 7"), log_of(tmp_path)
    finally:
        serving.send_signal(signal.SIGINT)
        serving.wait(timeout=120)


def _is_ready(url: str) -> bool:
    try:
        return ask(url, "/readyz")[0] == 200
    except (OSError, ValueError):
        return False


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text()[-4000:]
