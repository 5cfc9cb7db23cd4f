"""What the probe expects of the quickstart against what it then takes."""

import json

import pytest
from small_runs import command, run


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 3])
def test_the_estimate_is_within_a_quarter_of_what_the_run_takes(tmp_path, time):
    line = command("run", tmp_path, "cluster.price_per_cpu_hour=100")
    result = run([*line, "--estimate"], timeout=580)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((tmp_path / "quickstart" / "estimate.json").read_text())
    taken = found["taken"]
    assert found["total"] == pytest.approx(sum(found["seconds"].values()))
    assert abs(found["total"] / taken["total"] - 1) <= 0.25, result.stderr[-4000:]
    assert abs(found["cost"] / taken["cost"] - 1) <= 0.25, result.stderr[-4000:]
    assert "s expected" in result.stderr
    assert not (tmp_path / ".probe-quickstart").exists()
