"""Names in MLflow: whatever classes are called, every figure arrives under a name of its own."""

import json
from pathlib import Path

import mlflow.utils.validation
from hypothesis import given
from hypothesis import strategies as st
from test_mlflow_run import tracker

from ray_synth.monitoring.mlflow_names import LONGEST, changed_names, safe_names

ODD = [
    "it's", "a, b", "mouse (animal)", "c++", "50%", "x" * 250, "x" * 251, "Cat", "cät", "../up", "a//b",
    "/root", "..", ".", "", " ", "\u0645\u06cc\u200c\u062e", "a\nb", "🦢", "x:y", "dog ", "\udcff",
    "a/b/", "日本語",
]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(["m", "by_class"]), st.text(max_size=300)), unique=True))
def test_any_names_become_ones_that_are_taken_and_differ(paths):
    names = safe_names(paths)
    assert len({name.casefold() for name in names}) == len(paths)
    for name in names:
        mlflow.utils.validation._validate_metric_name(name)
        assert 0 < len(name) <= LONGEST
    # The same whatever the order.
    assert names == safe_names(paths[::-1])[::-1]
    told = {entry["metric"]: tuple(entry["stands_for"]) for entry in changed_names(paths, names)}
    for path, name in zip(paths, names, strict=True):
        assert told.get(name, tuple(name.split(".", 1))) == path


def test_names_that_a_database_reads_alike_are_told_apart():
    same = safe_names([("Cat",), ("cat",), ("çat",), ("a", "b.c"), ("a.b", "c"), ("dog",)])
    assert len(set(same)) == 6
    assert same[-1] == "dog"
    assert all(len(name.rpartition("-")[2]) == 12 for name in same[:-1])


def test_odd_class_names_cost_no_figure_and_are_kept_whole(tmp_path):
    one = tracker(tmp_path)
    by_class = {"cat": 1.0, **{name: float(at) for at, name in enumerate(ODD)}}
    values = {"in_domain": {"top1": 50.0, "by_class": by_class}}
    one.metrics({"num_real": 5, "mixed": {"main": values}})
    one.end()
    kept = one.client.get_run(one.run_id).data.metrics
    assert len(kept) == 2 + len(by_class)
    assert kept["mixed.main.in_domain.top1"] == 50.0
    assert not one.quietly.said
    table = json.loads(
        Path(one.client.download_artifacts(one.run_id, "metric_names.json")).read_text()
    )
    found = {tuple(entry["stands_for"])[-1]: kept[entry["metric"]] for entry in table}
    assert {name: found[name] for name in ODD if name in found} == {
        name: by_class[name] for name in ODD if name in found
    }
    assert {"it's", "x" * 250, "", "\udcff", "Cat"} <= found.keys()
