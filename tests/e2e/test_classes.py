"""Classes come and go: a finished run, then one with a class more, one renamed and one that is gone."""

import json

import pytest
from small_runs import SMALL, command, planned_ids, run, stored_ids


def classes(names: dict[str, str]) -> list[str]:
    """Settings of these classes, {name: digit}."""
    mapping = json.dumps({digit: name for name, digit in names.items()})
    sets = ("data.train", "data.test", "data.ood.uci_digits")
    return [
        f"data.class_names={json.dumps(list(names))}",
        *(f"{part}.class_map={mapping}" for part in sets),
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_class_more_costs_its_own_images_and_a_training(tmp_path):
    others = [setting for setting in SMALL if "class_" not in setting]
    first = classes({"one": "one", "six": "six", "seven": "seven"})
    found = run(command("run", tmp_path, *others, *first))
    assert found.returncode == 0, found.stderr[-3000:]
    second = classes({"half a dozen": "six", "seven": "seven", "zero": "zero"})
    earlier = tmp_path / "quickstart"
    found = run(
        [
            *command("run", tmp_path, *others, *second, "name=more"),
            *("--from", str(earlier), "--set", "take_over.renamed={six: half a dozen}"),
            *("--set", "data.class_info={zero: {synonyms: [nought], parent: number}}"),
        ]
    )
    assert found.returncode == 0, found.stderr[-3000:]
    later = tmp_path / "more"
    metrics = json.loads((later / "metrics.json").read_text())
    assert metrics["taken_over"] == {
        "run": str(earlier),
        "meanings": {"taken": 2, "made": 1},
        "contexts": {"taken": 2, "made": 1},
        "images": {"taken": 64, "made": 32},
    }
    assert metrics["mixed"]["main"]["in_domain"]["top1"] > 0
    assert "2 of 3 classes are those of" in found.stderr and "new: zero; gone: one" in found.stderr
    assert "64 of 96 images are those of" in found.stderr
    assert sorted(stored_ids(later)) == sorted(planned_ids(later)), "each image once"
    assert len(set(stored_ids(later)) & set(stored_ids(earlier))) == 64
    entries = {
        entry["class_name"]: entry for entry in json.loads((later / "meanings.json").read_text())
    }
    before = {
        entry["class_name"]: entry for entry in json.loads((earlier / "meanings.json").read_text())
    }
    assert entries["half a dozen"]["choice"] == before["six"]["choice"]
    zero = {
        candidate["meaning"]: candidate["source"] for candidate in entries["zero"]["candidates"]
    }
    assert zero["a nought"] == zero["a kind of number"] == "user"
    assert entries["zero"]["told"] == {"synonyms": ["nought"], "parent": "number"}
    page = (later / "report" / "index.html").read_text()
    assert "Taken over" in page and "64 kept, 32 made" in page and "Licences" in page
