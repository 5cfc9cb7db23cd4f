"""Which Pythons and systems the pinned packages can be installed on, without installing them.

    python jobs/compat.py

Asks the package registry (with uv) whether each version in constraints.txt has a wheel there, for
what ray-synth needs and for its extras but `dev`. Prints a table; exit code 1 where one is missing.
"""

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SYSTEMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux arm64": "aarch64-manylinux_2_28",
    "macOS arm64": "aarch64-apple-darwin",
    "Windows x86-64": "x86_64-pc-windows-msvc",
}


def resolve(python: str, platform: str) -> str:
    """Empty where everything is available as a wheel, else what uv says is missing."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    asked = [word for name in extras if name != "dev" for word in ("--extra", name)]
    uv = Path(sys.executable).parent / "uv"
    done = subprocess.run(
        [
            *(uv, "pip", "compile", "pyproject.toml", *asked, "--constraint", "constraints.txt"),
            *("--python-version", python, "--python-platform", platform),
            *("--only-binary", ":all:", "--quiet", "--output-file", os.devnull),
        ],
        cwd=ROOT,
        # PyTorch's wheels ask for macOS 14.
        env=os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def main() -> int:
    print("| Python | " + " | ".join(SYSTEMS) + " |")
    print("|---|" + "---|" * len(SYSTEMS))
    missing = []
    for python in PYTHONS:
        cells = []
        for system, platform in SYSTEMS.items():
            said = resolve(python, platform)
            cells.append("no" if said else "yes")
            missing += [f"Python {python}, {system}: {said}"] if said else []
        print(f"| {python} | " + " | ".join(cells) + " |", flush=True)
    print("\n".join(missing), file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.exit(main())
