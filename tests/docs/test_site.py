"""The docs as a site: it builds without a warning or a network, and what is generated is fresh."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import lxml.html
import pytest
import yaml
from samples import ROOT
from small_runs import QUICKSTART, SMALL

from ray_synth.config import Config, flatten, load_config

OLD = ["prompting.multiplier=4", "tracking.enabled=false"]
NARROW = (
    "training.model_kwargs={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1], stem_chs: 8, "
    "stem_type: deep, output_stride: 8}"
)
EXAMPLES = re.compile(r"^```pycon\n(.*?)^```", re.M | re.S)


def _reference() -> Any:
    spec = importlib.util.spec_from_file_location("job_reference", ROOT / "jobs/reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _reference()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does; strict: any page, link or anchor that is not there ends it."""
    folder = tmp_path_factory.mktemp("site")
    line = ["build", "--strict", "--config-file", "docs/site/mkdocs.yml", "--site-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *line],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_every_link_of_the_built_pages_leads_to_a_file_and_an_anchor(site: Path) -> None:
    """Those of the theme and of copied sources as well, which mkdocs does not look at."""
    trees = {path: lxml.html.parse(str(path)).getroot() for path in site.rglob("*.html")}
    trees = {p: t for p, t in trees.items() if "source" not in p.parts and p.name != "404.html"}
    anchors = {p.resolve(): set(t.xpath("//@id | //@name")) for p, t in trees.items()}
    assert len(trees) > 20
    wrong = []
    for path, tree in trees.items():
        for link in tree.xpath("//a/@href | //img/@src | //script/@src | //link/@href"):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            there = target in anchors and (
                not parts.fragment or unquote(parts.fragment) in anchors[target]
            )
            if not there and (parts.fragment or not target.is_file()):
                wrong.append(f"{path.relative_to(site)}: {link}")
    assert wrong == []


def test_a_page_asks_no_other_host_for_anything(site: Path) -> None:
    for path in site.rglob("*.html"):
        tree = lxml.html.parse(str(path)).getroot()
        loaded = tree.xpath("//script/@src | //img/@src | //link[@rel='stylesheet']/@href")
        assert [link for link in loaded if urlsplit(link).netloc] == [], path
        if path.is_relative_to(site / "source"):
            continue
        assert "fonts.googleapis" not in path.read_text(encoding="utf-8")


def test_links_out_of_the_docs_lead_to_copies(site: Path) -> None:
    page = (site / "architecture.html").read_text(encoding="utf-8")
    assert 'href="source/ray_synth/pipeline/steps.py.txt"' in page
    copy = site / "source/ray_synth/pipeline/steps.py.txt"
    assert copy.read_bytes() == (ROOT / "ray_synth/pipeline/steps.py").read_bytes()
    listing = (site / "source/ray_synth/storage/index.txt").read_text(encoding="utf-8")
    assert "folder.py" in listing


@pytest.mark.parametrize("name", list(reference.PAGES))
def test_the_reference_is_what_the_code_says(name: str) -> None:
    written = (ROOT / "docs/reference" / name).read_text(encoding="utf-8")
    assert written == reference.PAGES[name](), "run: make reference"


def test_the_reference_has_every_setting_with_its_mark() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (result|how) \|", reference.settings(), re.M)
    config = load_config(QUICKSTART)
    keys = {key.rpartition(".")[2] for key in flatten(config.model_dump(mode="json"))}
    free = {"six", "seven"} | {k for k in keys if k not in _fields(Config)}
    assert keys - free <= {name for name, _ in rows}
    assert len(rows) == sum(len(section.model_fields) for section in reference._sections())


def _fields(model: Any) -> set[str]:
    return {name for section in reference._sections() for name in section.model_fields}


# Examples ------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the finished run of an older version, and a small config."""
    with tarfile.open(ROOT / "tests/pipeline/runs_0_1.tar.xz") as archive:
        archive.extractall(tmp_path / "runs", filter="data")
    config = load_config(QUICKSTART, [*SMALL, *OLD, NARROW, "name=small"])
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(text: str, globs: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(text, globs, "examples", None, 0)
    said: list[str] = []
    found = doctest.DocTestRunner(
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False
    ).run(test, out=said.append, clear_globs=False)
    globs.update(test.globs)
    assert found.failed == 0, "".join(said)
    assert found.attempted


def _page() -> list[str]:
    return EXAMPLES.findall((ROOT / "docs/python.md").read_text(encoding="utf-8"))


def test_the_examples_that_look_are_right(place: Path) -> None:
    looking, doing = _page()[:-1], _page()[-1]
    assert "ray_synth.train(" in doing
    before = set(place.rglob("*"))
    globs: dict[str, Any] = {}
    for text in looking:
        _run(text, globs)
    from ray_synth.pipeline.api import Run

    assert Run.__doc__
    _run(Run.__doc__, {"Run": Run})
    assert set(place.rglob("*")) == before, "nothing is written"


@pytest.mark.slow
def test_the_examples_that_do_are_right(place: Path) -> None:
    globs: dict[str, Any] = {}
    for text in _page():
        _run(text, globs)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """As it lies in docs/, beside jobs/; and it is kept without its outputs."""
    import nbclient
    import nbformat

    (tmp_path / "docs").mkdir()
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    shutil.copy(ROOT / "docs/tutorial.ipynb", tmp_path / "docs")
    notebook = nbformat.read(tmp_path / "docs/tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=500, resources={"metadata": {"path": str(tmp_path / "docs")}}
    ).execute()
    last = "".join(str(output) for output in notebook.cells[-1].outputs)
    assert "verdict='done'" in last
    assert any("image/png" in o.get("data", {}) for cell in notebook.cells
               for o in cell.get("outputs", []))  # fmt: skip


def test_the_notebook_is_kept_without_outputs() -> None:
    kept = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in kept["cells"] if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and not cell["execution_count"] for cell in code)
