"""What a document may say: each check takes a document and yields one line for each mistake in it."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import ray
import typer
import yaml
from documents import SHELL, Document, commands
from samples import ROOT

from ray_synth.cli.command import app
from ray_synth.config import Config, load_config, parse_config
from ray_synth.errors import UserError

LANGUAGES = {*SHELL, "python", "pycon", "yaml", "json", "text"}
FOLDERS = ("ray_synth", "jobs", "serve", "tests", "docs")
# Programs that the documents call, besides those whose options are looked up below.
OTHERS = {
    "apt", "cd", "curl", "echo", "export", "git", "grep", "kill", "kubectl", "ls", "notify",
    "prometheus", "promtool", "sleep", "source", "true", "ulimit", "wait",
}  # fmt: skip
QUICKSTART = ROOT / "jobs/configs/quickstart.yaml"
SECTIONS = tuple(name for name in Config.model_fields if name not in ("name", "runs_dir", "seed"))
SETTING = rf"(?P<key>({'|'.join(SECTIONS)})(\.(?!(ya?ml|py|md)$)[\w*]+)+)((: |=)(?P<value>.*))?"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Names of others that no code here has to know.
THEIRS = {
    "relax_collectives_on_preemption", "save_to_disk", "serve_num_http_requests",
    "terminationGracePeriodSeconds", "worker_start_ray_commands",
}  # fmt: skip
CODE_FILES = (".py", ".yaml", ".yml", ".json", ".html", ".j2", ".toml")


@cache
def code() -> str:
    """All code and settings with the names of their files, as one text."""
    folders = [ROOT / folder for folder in FOLDERS if folder != "tests"]
    found = [path for folder in folders for path in folder.rglob("*")]
    texts = [path.read_text(encoding="utf-8") for path in found if path.suffix in CODE_FILES]
    return "\n".join([*texts, *(path.stem for path in found)])


def known(name: str) -> bool:
    """Whether code or settings say it; figures have the prefix of ray_synth/metrics.py."""
    return name in THEIRS or occurs(name.removeprefix("ray_synth_"), code())


def occurs(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


# Links and paths -----------------------------------------------------------------------------------


def links(document: Document) -> Iterator[str]:
    """Targets that are not there; texts that name another file than the target."""
    for text, target in document.links:
        if re.match(r"https?://", target):
            continue
        place, _, anchor = target.partition("#")
        path = document.path.parent / place if place else document.path
        if not path.exists():
            yield f"[{text}]({target}): no such file"
            continue
        page = Document.read(path) if place and anchor else document
        if anchor and unquote(anchor) not in page.anchors:
            yield f"[{text}]({target}): no such heading"
        if text.endswith((*CODE_FILES, ".md")) and " " not in text and Path(text).name != path.name:
            yield f"[{text}]({target}): the text names another file"


def paths(document: Document) -> Iterator[str]:
    """Paths of this repository that are not there, in code of any kind."""
    texts = [*document.inline_code, *(block.text for block in document.blocks)]
    for word in re.findall(r"[^\s'\"`=,;()\[\]{}]+", "\n".join(texts)):
        word, _, _ = word.rstrip(".:").partition("::")
        in_folder = word.split("/")[0] in FOLDERS and "/" in word
        looks_like_one = in_folder or re.fullmatch(
            r"[A-Z]\w+\.md|cluster\.ya?ml|constraints\.txt", word
        )
        if looks_like_one and not any(ROOT.glob(word.rstrip("/"))):
            yield f"{word}: no such path"


@cache
def tests() -> frozenset[str]:
    """Names of all tests."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    return frozenset(name for name in found if name.startswith("test_"))


def names(document: Document) -> Iterator[str]:
    """Tests, variables, settings and other names in inline code that no code knows."""
    for text in document.inline_code:
        if re.fullmatch(r"test_\w+", text):
            if text not in tests():
                yield f"{text}: no such test"
        elif found := re.fullmatch(SETTING, text):
            yield from setting(found["key"], found["value"] or "")
        elif re.fullmatch(r"[a-z]\w*: .+", text):
            if not known(text.partition(":")[0]):
                yield f"{text}: no code knows this setting"
        elif re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+|([A-Z][a-z]+){2,}", text):
            if not known(text):
                yield f"{text}: no code knows this name"
        elif re.match(r"--[a-z]", text) and text.split()[0].split("=")[0] not in options():
            yield f"{text}: no command has this option"
    for name in set(re.findall(r"RAY_SYNTH_[A-Z_]+", document.text)):
        if not occurs(name, code()):
            yield f"{name}: no code reads this variable"


# Settings ------------------------------------------------------------------------------------------


def setting(key: str, value: str) -> Iterator[str]:
    """What is wrong with `key=value` on top of the quickstart; without a value, with the key."""
    if key == "a.b":  # as in `--set a.b=c`
        return
    if not value or value[0].isupper():
        if not has_field(Config, key.split(".")):
            yield f"{key}: no such setting"
        return
    try:
        load_config(QUICKSTART, [f"{key}={value}"])
    except UserError as error:
        yield f"{key}={value}: {error}"


def has_field(annotation: Any, keys: list[str]) -> bool:
    """Whether a type has a value at these keys; a mapping takes any."""
    if not keys or annotation is Any:
        return not keys or annotation is Any
    if fields := getattr(annotation, "model_fields", None):
        chosen = fields if keys[0] == "*" else {*fields} & {keys[0]}
        return any(has_field(fields[name].annotation, keys[1:]) for name in chosen)
    arguments = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) is dict:
        return has_field(arguments[1], keys[1:])
    return any(has_field(argument, keys) for argument in arguments)


class _Nth(yaml.SafeLoader):
    """Takes the n-th value of a key that is given several times, as alternatives."""

    n = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        values: dict[Any, list[Any]] = {}
        for key, value in node.value:
            values.setdefault(key.value, []).append((key, value))
        pairs = [given[min(self.n, len(given) - 1)] for given in values.values()]
        node = yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)
        return super().construct_mapping(node, deep)


def merged(under: Any, over: Any) -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        return under | {key: merged(under.get(key), value) for key, value in over.items()}
    return over


def configs(document: Document) -> Iterator[str]:
    """YAML that is no part of a config, nor of the launcher's file; JSON and Python that is none."""
    schema = Path(ray.__file__).parent / "autoscaler/ray-schema.json"
    launcher = json.loads(schema.read_text(encoding="utf-8"))["properties"].keys()
    quickstart = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    for language, text in ((block.language, block.text) for block in document.blocks):
        if language not in LANGUAGES:
            yield f"a block in {language or 'no language'}: {text[:40]!r}"
        try:
            if language == "json":
                json.loads(text)
            if language == "python":
                compile(text, "block", "exec")
            if language == "yaml":
                for n in range(4):
                    given = type("Loader", (_Nth,), {"n": n})(text).get_single_data()
                    if isinstance(given, dict) and not given.keys() <= launcher:
                        parse_config(merged(quickstart, given))
        except (ValueError, SyntaxError, yaml.YAMLError) as error:
            yield f"a block of {language}: {error}"


# Python --------------------------------------------------------------------------------------------


def python_names(document: Document) -> Iterator[str]:
    """Dotted names that must be there: what is imported, what is taken from a module, our modules."""
    blocks = [block.text for block in document.blocks if block.language == "python"]
    inline = [text for text in document.inline_code if re.match(r"(from \S+ )?import ", text)]
    nodes = [node for text in (*blocks, *inline) for node in ast.walk(ast.parse(text))]
    used = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in used if isinstance(node.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if re.fullmatch(r"\w+(\.\w+)+", dotted) and dotted.split(".")[0] not in bound:
                yield dotted
    for text in document.inline_code:
        if found := re.fullmatch(r"((?:ray_synth|jobs)(?:\.\w+)+)(\(.*\))?", text):
            yield found[1]


def unresolved(dotted: Iterable[str]) -> list[str]:
    """Those of these names that neither import nor attribute leads to, in one process of its own."""
    script = """
import json, pkgutil, sys
missing = []
for name in json.load(sys.stdin):
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        missing.append(f"{name}: {error}")
json.dump(missing, sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, input=json.dumps(sorted(set(dotted))),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stderr.splitlines()[-1])


# Commands ------------------------------------------------------------------------------------------


def command_lines(document: Document) -> Iterator[str]:
    """Commands of shell blocks, of YAML that holds some, and of inline code."""
    for words in document.shell():
        yield from command_line(words)
    for block in document.blocks:
        given = yaml.safe_load(block.text) if block.language == "yaml" else {}
        keyed = {"_commands": given} if isinstance(given, list) else given
        lines = [line for key in keyed if key.endswith("_commands") for line in keyed[key]]
        for words in (words for line in lines for words in commands(line)):
            yield from command_line(words)
    for text in document.inline_code:
        for words in commands(text) if text.split()[0] in CHECKS and " " in text else ():
            if words[0] in CHECKS:
                yield from command_line(words, named=True)
        if text.split()[0] in tree("ray-synth").commands and " -" in text:
            yield from command_line(["ray-synth", *text.split()], named=True)


def command_line(words: list[str], *, named: bool = False) -> Iterator[str]:
    """What is wrong with a command; one that is only `named` may lack arguments."""
    program, *rest = words
    if program in CHECKS:
        yield from (f"{' '.join(words)}: {said}" for said in CHECKS[program](program, rest, named))
    elif program not in OTHERS:
        yield f"{' '.join(words)}: the documents call no such program"
    for flag, value in itertools.pairwise(words):
        if flag == "--set":
            yield from setting(*value.partition("=")[::2])


@cache
def tree(program: str) -> Any:
    """The verbs of a program and their options, as it reads them itself."""
    if program == "ray-synth":
        return typer.main.get_command(app)
    modules = {"ray": "ray.scripts.scripts", "serve": "ray.serve.scripts", "mlflow": "mlflow.cli"}
    return pkgutil.resolve_name(f"{modules[program]}:cli")


@cache
def options() -> frozenset[str]:
    """Every option of ours and of Ray's, and the ones of docker that the documents name alone."""
    found = {"--build-arg"}
    waiting = [tree("ray-synth"), tree("ray")]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        found |= {name for part in command.params for name in (*part.opts, *part.secondary_opts)}
    return frozenset(found)


def _verbs(program: str, rest: list[str], named: bool) -> Iterator[str]:
    """By the program's own reader, which is not run."""
    if "--" in rest:
        yield from command_line(rest[rest.index("--") + 1 :])  # what `ray job submit` starts
    try:
        _read(tree(program), [word for word in rest if word != "..."])
    except Exception as error:  # of click, or of the copy of it that typer has
        kind = type(error).__name__
        if kind != "Exit" and not (kind == "MissingParameter" and (named or "..." in rest)):
            yield getattr(error, "format_message", error.__str__)()


def _read(command: Any, words: list[str]) -> None:
    if not words and hasattr(command, "commands"):
        return
    context = command.make_context("", list(words))
    if hasattr(command, "commands"):
        _, verb, left = command.resolve_command(context, [*context._protected_args, *context.args])
        _read(verb, left)
    elif context.params.get("verb", "VERB") != "VERB":  # `ray-synth submit run ...`
        _read(tree("ray-synth"), [context.params["verb"], *(context.params["arguments"] or [])])


def _python(program: str, rest: list[str], named: bool) -> Iterator[str]:
    if rest[0] == "-m":
        found, *rest = rest[1:]
        spec = importlib.util.find_spec(found)
        if spec is None:
            yield "no such module"
        if found == "pytest":
            yield from _pytest(program, rest, named)
        if spec is None or found.split(".")[0] not in FOLDERS:
            return
        file = Path(spec.origin or "")
        sources = file.parent.glob("*.py") if file.name == "__init__.py" else [file]
    else:
        found, *rest = rest
        sources = [ROOT / found]
        if not sources[0].is_file():
            yield "no such file"
            return
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    for word in rest:
        name = word.partition("=")[0]
        if re.fullmatch(r"--[a-z-]+", name):
            if not occurs(name, text) and not occurs(name[2:].replace("-", "_"), text):
                yield f"{found} has no option {name}"
        elif re.fullmatch(r"[a-z_]+", word) and not occurs(word, text):
            yield f"{found} knows no {word!r}"


def _pytest(program: str, rest: list[str], named: bool) -> Iterator[str]:
    settings = PROJECT["tool"]["pytest"]["ini_options"]
    markers = [marker.partition(":")[0] for marker in settings["markers"]]
    for flag, value in itertools.pairwise(rest):
        if flag == "-m" and not {*value.split()} <= {*markers, "not", "and", "or"}:
            yield f"no marker {value!r}"
        if flag == "-k" and not any(value in name for name in tests()):
            yield f"no test has {value!r} in its name"
    for word in rest:
        if "::" in word and word.rpartition("::")[2].partition("[")[0] not in tests():
            yield f"no test {word}"


def _make(program: str, rest: list[str], named: bool) -> Iterator[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in rest:
        name, setting, _ = word.partition("=")
        if setting and f"$({name})" not in makefile:
            yield f"the Makefile reads no {name}"
        elif not setting and not re.search(rf"^{re.escape(word)}:", makefile, re.M):
            yield f"no target {word}"


def _pip(program: str, rest: list[str], named: bool) -> Iterator[str]:
    for word in rest:
        found = re.fullmatch(r"(?:ray-synth|\.)\[([\w,]+)\]", word)
        for extra in found[1].split(",") if found else ():
            if extra not in PROJECT["project"]["optional-dependencies"]:
                yield f"no extra {extra}"
    if "-c" in rest and not (ROOT / rest[rest.index("-c") + 1]).is_file():
        yield "no such file of constraints"


def _docker(program: str, rest: list[str], named: bool) -> Iterator[str]:
    dockerfile = (ROOT / "docs/docker/Dockerfile").read_text(encoding="utf-8")
    for flag, value in itertools.pairwise(rest):
        name = value.partition("=")[0]
        if flag == "--build-arg" and not re.search(rf"^ARG {re.escape(name)}\b", dockerfile, re.M):
            yield f"the Dockerfile has no ARG {name}"
    if "ray-synth" in rest:
        yield from command_line(rest[rest.index("ray-synth") :])


CHECKS: dict[str, Callable[[str, list[str], bool], Iterator[str]]] = {
    **dict.fromkeys(("ray-synth", "ray", "serve", "mlflow"), _verbs),
    "python": _python,
    "pytest": _pytest,
    "make": _make,
    "pip": _pip,
    "docker": _docker,
}
