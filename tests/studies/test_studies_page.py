"""The page of all studies in a real browser, as wide as a phone."""

import shutil

import pytest

from ray_synth.report.page import write_report
from ray_synth.storage.folder import Folder
from ray_synth.studies import plots
from ray_synth.studies.arm import REAL_ONLY, Arm
from ray_synth.studies.catalog import WRITERS
from ray_synth.studies.design import Study
from ray_synth.studies.page import write_page
from ray_synth.studies.results import accuracy_table, result_rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<script>document.title = 'taken'</script>"
ARMS = (Arm(REAL_ONLY, "real only"), Arm("whole", f"the whole {HOSTILE}", 6.0))


def write_study(folder: Folder, name: str) -> None:
    study = Study(name, f"The study {name}", "Why is that so?", ARMS, bns=("main",))
    found = {
        (arm.name, seed): {
            "main": {s: {"top1": 80.0 + seed + 5 * (arm.scale > 0)} for s in ("in_domain", "far")}
        }
        for arm in ARMS
        for seed in (0, 1)
    }
    rows = result_rows(study, found)
    for kind in ("png", "svg"):
        folder.write_bytes(f"plot.{kind}", plots.save(plots.draw(study, rows), kind))
    folder.write_json(
        "study.json",
        {
            "name": name,
            "title": study.title,
            "question": study.question,
            "seeds": [0, 1],
            "plots": ["plot"],
            "tables": [vars(accuracy_table(study, rows))],
        },
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium (CI does)")
def test_all_studies_can_be_read_on_a_phone_and_nothing_is_loaded(tmp_path):
    from playwright.sync_api import sync_playwright

    folder = Folder(tmp_path)
    for name in WRITERS:
        write_study(folder.child("studies").child(name), name)
    folder.write_yaml("config.yaml", {"name": "a run"})
    write_report(folder)
    address = write_page(folder, list(WRITERS), "a run")
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--disable-gpu", "--no-first-run", "--disable-background-networking"],
            chromium_sandbox=False,
        )
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{address}")
        assert page.locator("section").count() == len(WRITERS)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 100)")
        assert page.title() == "Studies of a run · ray-synth"
        page.get_by_role("link", name="The study robustness").click()
        table = page.locator("#robustness table").first
        assert "+5.0" in table.inner_text() and HOSTILE in table.inner_text()
        page.get_by_role("link", name="The report of the run").click()
        page.get_by_role("link", name="Studies of this run").click()
        assert page.url.endswith("/studies/index.html")
        box = page.locator("#robustness .scroll").first.bounding_box()
        assert box is not None and box["width"] <= 390
        browser.close()
    assert all(url.startswith(("file://", "data:")) for url in asked)


def test_a_page_without_studies_says_how_to_run_one(tmp_path):
    address = write_page(Folder(tmp_path), list(WRITERS), "empty")
    with open(address) as file:
        assert "ray-synth study ablation" in file.read()
