"""A look before spending: the first images of a run, which the run goes on from."""

import json

import pytest
from small_runs import SMALL, command, planned_ids, run, stored_ids


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_preview_is_the_beginning_of_its_run(tmp_path):
    settings = [*SMALL, "meaning.enabled=false", "cluster.price_per_cpu_hour=1"]
    found = run(command("preview", tmp_path, *settings), timeout=400)
    assert found.returncode == 0, found.stderr[-3000:]
    folder = tmp_path / "quickstart"
    first = stored_ids(folder)
    # 2 of each of 2 classes and 3 kinds, in whole batches of 8
    assert sorted(first) == sorted(planned_ids(folder)[:16])
    said = json.loads((folder / "preview.json").read_text())
    assert (said["images"], said["planned"]) == (12, 64)
    assert said["hours"] > 0 and said["cost"] > 0
    assert "12 of 64 planned images" in found.stdout
    page = (folder / "report" / "index.html").read_text()
    assert "What the whole would take" in page and "What the checks found" in page
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "images").glob("part-*")}
    found = run(command("generate", tmp_path, *settings), timeout=400)
    assert found.returncode == 0, found.stderr[-3000:]
    assert sorted(stored_ids(folder)) == sorted(planned_ids(folder)), "each one once"
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "images").glob("part-*")}
    assert before.items() <= kept.items()
