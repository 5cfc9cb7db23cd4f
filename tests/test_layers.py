"""The plan of the house: rooms in order, no circle, heavy packages only where they are at work."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import ROOT

PACKAGE = ROOT / "ray_synth"
# From the ground up: a room imports only what stands before it, and its own.
ROOMS = (
    "errors", "metrics", "device", "storage", "config", "stages", "embedded", "data", "monitoring",
    "cluster", "meaning", "generators", "prompting", "generation", "service", "training",
    "evaluation", "report", "export", "preflight", "pipeline", "studies", "cli",
)  # fmt: skip
HEAVY = {"ray", "torch", "torchvision", "diffusers", "transformers", "open_clip", "timm", "mlflow"}
# What is imported with a process that computes: a training worker, a replica, a model in MLflow.
MAY_BE_HEAVY = {
    "training": {"torch", "torchvision", "ray"},
    "service": {"ray"},
    "monitoring.mlflow_classifier": {"mlflow", "torch", "timm", "torchvision"},
}


def modules(package: Path) -> dict[str, ast.Module]:
    """Dotted name inside the package -> its source; a package's `__init__` has the package's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        found[name.removesuffix("__init__").rstrip(".")] = ast.parse(path.read_text())
    return found


def imports(tree: ast.AST, *, loaded: bool = False) -> Iterator[str]:
    """Dotted names that a module imports anywhere; with `loaded`, those that come when it is loaded."""
    for node in ast.iter_child_nodes(tree):
        if loaded and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if loaded and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute here"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node, loaded=loaded)


def inside(trees: dict[str, ast.Module], *, loaded: bool = False) -> dict[str, set[str]]:
    """Module -> modules of this package that it imports."""
    graph = {}
    for name, tree in trees.items():
        wanted = {i.removeprefix("ray_synth.") for i in imports(tree, loaded=loaded)}
        graph[name] = {other for other in wanted & set(trees) if other and other != name}
    return graph


def out_of_order(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a room that stands above."""
    place = {room: at for at, room in enumerate(ROOMS)}
    return [
        f"{name} imports {other}"
        for name, others in sorted(graph.items())
        for other in sorted(others)
        if name and place[other.split(".")[0]] > place[name.split(".")[0]]
    ]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that are reached from themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [*graph[start]]
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += graph.get(name, ())
        return seen

    return [name for name in graph if name in reached(name)]


def heavy_loads(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> heavy packages that loading it loads, by way of others as well."""
    graph = inside(trees, loaded=True)
    own = {
        name: {i.split(".")[0] for i in imports(tree, loaded=True)} & HEAVY
        for name, tree in trees.items()
    }
    for _ in trees:
        own = {n: own[n].union(*(own[o] for o in graph[n])) for n in own}
    return {name: found for name, found in own.items() if found}


TREES = modules(PACKAGE)


def test_every_room_has_its_place():
    assert {name.split(".")[0] for name in TREES if name} == set(ROOMS)
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_a_room_imports_only_what_stands_before_it():
    assert out_of_order(inside(TREES)) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circles(inside(TREES)) == []


def test_heavy_packages_are_loaded_where_they_are_at_work():
    for name, found in heavy_loads(TREES).items():
        allowed = [p for at, p in MAY_BE_HEAVY.items() if name == at or name.startswith(f"{at}.")]
        assert found <= set().union(*allowed), f"{name} loads {sorted(found)} when it is imported"


@pytest.mark.parametrize("module", ["ray_synth", "ray_synth.cli.command", "ray_synth.pipeline.run"])
def test_a_command_starts_light(module):
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_checks_see_what_they_are_for():
    """A circle through a function, an import upwards, and a heavy package by way of another module."""
    trees = {
        "data.a": ast.parse("def f():\n    from ray_synth.data.b import g\n"),
        "data.b": ast.parse(
            "import ray_synth.data.a\nfrom ray_synth.cli import c\nimport torch.nn"
        ),
        "data.d": ast.parse("from ray_synth.data.b import g"),
        "cli.c": ast.parse("from ray_synth.storage.folder import Folder"),
    }
    graph = inside(trees)
    assert circles(graph) == ["data.a", "data.b"]
    assert out_of_order(graph) == ["data.b imports cli.c"]
    assert heavy_loads(trees) == {"data.b": {"torch"}, "data.d": {"torch"}}


def test_functions_fit_a_screen_and_a_half():
    long = [
        f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= 60
    ]
    assert long == []
