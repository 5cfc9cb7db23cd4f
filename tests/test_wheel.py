"""The wheel is one package with all that it reads, and works where there is no checkout."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from head import start_head, wait_for
from samples import ROOT
from service import ask, free_port

CARRIED = (
    "cli/command.py",
    "embedded/MODEL_CARD.md",
    "embedded/weights/clip/open_clip_model.safetensors",
    "embedded/weights/sd/unet/diffusion_pytorch_model.safetensors",
    "export/card.md.j2",
    "py.typed",
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


def test_it_is_as_an_index_wants_it(wheel: Path) -> None:
    """Its description can be shown, and nothing lies in it that should not; it stays small."""
    for line in (["twine", "check", "--strict"], ["check_wheel_contents"]):
        done = subprocess.run(
            [sys.executable, "-m", *line, wheel], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert wheel.stat().st_size < 30e6, "the embedded models are most of it"


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
    with (tmp_path / "log.txt").open("w") as log:
        serving = subprocess.Popen(
            [sys.executable, "-m", *command, "run", str(serve_config)],
            cwd=cwd, env=env, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_for(lambda: serving.poll() is not None or answers(serve_config))
        assert serving.poll() is None, (tmp_path / "log.txt").read_text()[-4000:]
    finally:
        serving.send_signal(signal.SIGINT)
        serving.wait(timeout=120)


@pytest.mark.slow
def test_serve_deploy_answers(
    installed: dict[str, str], serve_config: Path, tmp_path: Path
) -> None:
    """Onto a cluster whose nodes have the wheel's package and no checkout."""
    with start_head(PYTHONPATH=installed["PYTHONPATH"]) as head:
        address = head.env["RAY_API_SERVER_ADDRESS"]
        words = ("serve", "deploy", str(serve_config), "--address", address)
        ray_synth(head.env, tmp_path, *words)
        wait_for(lambda: answers(serve_config))


def answers(serve_config: Path) -> bool:
    """Whether the service is there yet; what it then answers is right."""
    port = yaml.safe_load(serve_config.read_text())["http_options"]["port"]
    url = f"http://127.0.0.1:{port}"
    try:
        if ask(url, "/readyz")[0] != 200:
            return False
    except (OSError, ValueError):
        return False
    question = {"class_name": "seven", "context": "a list of numbers", "num_meanings": 0}
    status, answer = ask(url, "/disambiguate", {**question, "meanings": ["the number 7"]})
    assert (status, answer["choice"]) == (200, "the number 7")
    return True
