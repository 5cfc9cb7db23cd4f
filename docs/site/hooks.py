"""What mkdocs needs to know of these pages: they are read in the repository as well.

Links that leave docs/, and links to folders, work there by themselves. In the site each such target is
there as a text file under `source/`, so the site is whole without the repository and without a network.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def on_config(config: Any) -> Any:
    """Headings get the anchors that they have in a repository's pages."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds what pages link to and no page is."""
    wanted = {
        target: copy
        for file in files.documentation_pages()
        for target, copy in _sources(Path(str(file.abs_src_path)).read_text("utf-8"), file.src_uri)
    }
    for target, copy in sorted(wanted.items(), key=str):
        text = _listing(target) if target.is_dir() else None
        source = {"content": text} if text is not None else {"abs_src_path": str(target)}
        files.append(File.generated(config, copy, **source))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to such targets to their copies."""
    copies = dict(_sources(markdown, page.file.src_uri))
    start = posixpath.dirname(page.file.src_uri)

    def turned(found: re.Match[str]) -> str:
        copy = copies.get(_target(found[1], page.file.src_uri))
        return posixpath.relpath(copy, start or ".") if copy else found[1]

    return LINK.sub(turned, markdown)


def _sources(markdown: str, src_uri: str) -> Iterator[tuple[Path, str]]:
    """Targets outside docs/, and folders, each with its place in the site."""
    for found in LINK.finditer(markdown):
        target = _target(found[1], src_uri)
        if target.is_relative_to(ROOT) and target.exists():
            name = target.relative_to(ROOT).as_posix()
            if target.is_dir():
                yield target, f"source/{name}/index.txt"
            elif not target.is_relative_to(DOCS):
                yield target, f"source/{name}" + ("" if target.suffix == ".html" else ".txt")


def _target(link: str, src_uri: str) -> Path:
    return (DOCS / posixpath.dirname(src_uri) / link).resolve()


def _listing(folder: Path) -> str:
    """The files of a folder with the first line of what each says of itself."""
    lines = [f"{folder.relative_to(ROOT).as_posix()}/", ""]
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__pycache__")):
            continue
        text = path.read_text("utf-8") if path.suffix == ".py" else ""
        said = re.match(r'"""(.+)', text)
        lines.append(f"{path.name:<30} {said[1].strip(chr(34)) if said else ''}".rstrip())
    return "\n".join(lines) + "\n"
