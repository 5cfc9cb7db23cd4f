"""What the probe expects of the quickstart against what it then takes."""

import json

import pytest
from runs import command, run


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 3])
def test_the_estimate_is_within_a_quarter_of_what_the_run_takes(tmp_path, time):
    result = run([*command("run", tmp_path), "--estimate"], timeout=580)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((tmp_path / "quickstart" / "estimate.json").read_text())
    expected, taken = sum(found["seconds"].values()), sum(found["taken"].values())
    assert expected == pytest.approx(found["total"])
    assert abs(expected / taken - 1) <= 0.25, result.stderr[-4000:]
    assert "s expected" in result.stderr
    assert not (tmp_path / ".probe-quickstart").exists()
