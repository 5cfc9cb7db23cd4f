"""Studies as a user starts them: on their own folder of images, killed, and with a seed more."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw
from small_runs import NO_LLM, ROOT, SMALL, line, sets

from ray_synth.studies.catalog import WRITERS

SHAPES = ("disc", "square", "cross")
TINY = [
    "studies.scale=2",
    "training.steps=6",
    "training.batch_size=12",
    "training.checkpoint_every=3",
    "prompting.contexts_per_class=2",
    "meaning.num_meanings=1",
    "meaning.retries=0",
    "generation.num_inference_steps=1",
]


def study(name: str, config: Path, *settings: str, seeds: str = "0", **options) -> subprocess.Popen:
    return subprocess.Popen(
        line("study", name, "--config", str(config), "--seeds", seeds, *sets(*settings)),
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def finished(process: subprocess.Popen, timeout: float = 500) -> str:
    text, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, text[-4000:]
    return text


def draw(shape: str, seed: int) -> Image.Image:
    """A grey shape on a noisy page of 56 x 40 pixels."""
    rng = np.random.default_rng(seed)
    page = Image.fromarray(rng.integers(160, 255, (40, 56, 3)).astype(np.uint8))
    x, y, r = int(rng.integers(14, 42)), int(rng.integers(12, 28)), int(rng.integers(6, 11))
    pen = ImageDraw.Draw(page)
    if shape == "disc":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(60, 60, 60))
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=(60, 60, 60))
    else:
        pen.line((x - r, y, x + r, y), fill=(60, 60, 60), width=4)
        pen.line((x, y - r, x, y + r), fill=(60, 60, 60), width=4)
    return page


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """A folder with train/ and test/, three classes of 10 and 8 images."""
    folder = tmp_path_factory.mktemp("shapes")
    for part, count in (("train", 10), ("test", 8)):
        for number, shape in enumerate(SHAPES):
            (folder / part / shape).mkdir(parents=True)
            for i in range(count):
                draw(shape, 1000 * number + i + 100 * (part == "test")).save(
                    folder / part / shape / f"{i}.png"
                )
    return folder


@pytest.mark.slow
def test_a_study_of_ones_own_folder_from_init_alone_and_no_test_image_is_read_before_the_end(
    shapes, tmp_path
):
    """Test images are rubbish until the study has trained and chosen; then they are put right."""
    config = tmp_path / "mine.yaml"
    subprocess.run(
        line("init", "--images", str(shapes), "--out", str(config)),
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    kept = tmp_path / "kept"
    shutil.copytree(shapes / "test", kept)
    for path in (shapes / "test").rglob("*.png"):
        path.write_bytes(b"not a picture")
    settings = [
        *TINY, "meaning.enabled=false", "prompting.mix={plain: 1}", "generation.checks.policy=off",
        f"runs_dir={tmp_path / 'runs'}", "name=mine", "data.max_corrupt=1",
        "studies.lambdas=[0.5]", "studies.real_fractions=[0.75]",
    ]  # fmt: skip
    script = (
        "import sys; from ray_synth.cli.command import prepare_process; prepare_process();"
        "from ray_synth.config import load_config; from ray_synth.studies.study import run_studies;"
        "run_studies('mix', load_config(sys.argv[1], sys.argv[2:]), seeds=[0], until='validation')"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(config), *settings], cwd=ROOT, check=True, timeout=400
    )
    folder = tmp_path / "runs" / "mine" / "studies"
    models = {path: path.stat().st_mtime_ns for path in (folder / "arms" / "models").glob("*.json")}
    assert len(models) == 4  # real only, the whole, another λ, another mix
    assert not list((folder / "arms" / "results").glob("*.test.json"))

    shutil.copytree(kept, shapes / "test", dirs_exist_ok=True)
    text = finished(study("mix", config, *settings))
    assert {path: path.stat().st_mtime_ns for path in models} == models  # trained once
    found = json.loads((folder / "mix" / "study.json").read_text())
    for trial in found["trials"]:
        name = f"results/{trial['digest']}.test.json"
        result = json.loads((folder / "arms" / name).read_text())["main"]["in_domain"]
        assert result["images"] == 24  # all of them, none corrupt
    assert "Chosen on the validation images" in text
    assert yaml.safe_load(config.read_text())["data"]["train"]["path"].endswith("train")
    assert {p.name for p in (folder / "mix").iterdir()} >= {
        "study.json", "table.md", "table.parquet", "plot.png", "plot.svg", "mlflow.json",
    }  # fmt: skip


@pytest.mark.slow
def test_a_killed_study_trains_nothing_twice_and_a_seed_more_only_what_is_new(tmp_path):
    config = ROOT / "jobs" / "configs" / "quickstart.yaml"
    settings = [
        *SMALL, *NO_LLM, "training.steps=20", f"runs_dir={tmp_path}", "studies.scale=2",
        "studies.scales=[1,2]", "training.checkpoint_every=5", "data.validation=4",
    ]  # fmt: skip
    models = tmp_path / "quickstart" / "studies" / "arms" / "models"
    rng = random.Random(0)
    made: dict[Path, int] = {}

    def check() -> None:
        for path in models.glob("*.json"):
            stamp = path.stat().st_mtime_ns
            assert made.setdefault(path, stamp) == stamp, f"{path.name} was trained twice"

    for _ in range(4):
        process = study("scaling", config, *settings, seeds="0,1")
        time.sleep(rng.uniform(15, 45))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        check()
    finished(study("scaling", config, *settings, seeds="0,1"))
    check()
    assert len(made) == 2 * 5  # seeds; real only, and two scales with shared and with dual BN
    finished(study("scaling", config, *settings, seeds="0,1,2"))
    check()
    assert len(made) == 3 * 5
    children = json.loads((models.parents[1] / "scaling" / "mlflow.json").read_text())["children"]
    assert len(children) == 15


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_all_studies_end_with_tables_plots_and_a_page(tmp_path):
    """Small in every respect, but the models are the real ones, and so is every measure."""
    config = ROOT / "jobs" / "configs" / "quickstart.yaml"
    settings = [
        *SMALL, *TINY, f"runs_dir={tmp_path}", "meaning.num_images=2",
        "data.train.images_per_class=2", "data.validation=4", "studies.scales=[1,2]",
        "studies.images_per_class=[2]", "studies.lambdas=[0.5]", "studies.real_fractions=[0.75]",
        "studies.generators={fonts: {generator: glyphs}}",
        "studies.corruption={kinds: [blur], severities: [1], images: 8}", "tuning.steps=2",
    ]  # fmt: skip
    finished(study("all", config, *settings), timeout=900)
    folder = tmp_path / "quickstart" / "studies"
    for name in WRITERS:
        found = json.loads((folder / name / "study.json").read_text())
        assert all(table["rows"] for table in found["tables"]), name
        for plot in found["plots"]:
            assert (folder / name / f"{plot}.png").stat().st_size > 5000, (name, plot)
    page = (folder / "index.html").read_text()
    titles = {
        "domain_shift": ["Distance from the real images", "Layers"],
        "diversity": ["Diversity", "Prompts"],
        "generators": ["Cost", "Diversity", "Distance from the real images"],
        "llms": ["Meanings", "Chosen meanings", "Prompts"],
        "robustness": ["Corrupted test images"],
        "scaling": ["Where gains stop"],
        "low_data": ["Rare classes"],
        "mix": ["Chosen on the validation images"],
    }
    for name, expected in titles.items():
        tables = json.loads((folder / name / "study.json").read_text())["tables"]
        assert {table["title"] for table in tables} >= {*expected, "Accuracy", "Compute"}, name
        assert all(title in page for title in expected)
