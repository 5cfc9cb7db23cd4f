"""The page of all studies of a run, as one HTML file that loads nothing."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ray_synth.report.page import PAGE as REPORT
from ray_synth.report.page import write_report
from ray_synth.storage.folder import Folder
from ray_synth.studies.arm import STUDIES

PAGE = "index.html"
CAPTIONS = {
    "plot": "Gains, or top-1, with 95% intervals",
    "drift": "Top-1 as the test images are corrupted more and more",
    "layers": "Distance of synthetic from real images, layer by layer",
}


def write_page(run: Folder, names: list[str], title: str) -> str:
    """Write the page of the studies that were run, and have the run's report lead to it; its address.

    Args:
        run: the run's directory.
        names: of all studies, in the order of telling.
        title: the run's name.
    """
    folder = run.child(STUDIES)
    found = [read_study(folder.child(name)) for name in names]
    has_report = run.exists(REPORT)
    text = render([study for study in found if study], title, has_report=has_report)
    folder.write_bytes(PAGE, text.encode())
    if has_report:
        write_report(run)
    return folder.address(PAGE)


def read_study(folder: Folder) -> dict[str, Any] | None:
    """A study's title, tables and plots, or None where it was not run."""
    if not folder.exists("study.json"):
        return None
    study = folder.read_json("study.json")
    plots = [
        {
            "uri": "data:image/svg+xml;base64,"
            + base64.b64encode(folder.read_bytes(f"{name}.svg")).decode(),
            "caption": CAPTIONS.get(name, name),
        }
        for name in study["plots"]
        if folder.exists(f"{name}.svg")
    ]
    return {**study, "plots": plots}


def render(studies: list[dict[str, Any]], run: str, *, has_report: bool = False) -> str:
    """The page as HTML text; with `has_report` it leads to the run's report."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # class names and meanings come from strangers
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        studies=studies, run=run, has_report=has_report
    )


__all__ = ["read_study", "render", "write_page"]
