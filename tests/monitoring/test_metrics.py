"""The figures: declared once, recorded somewhere, shown and watched; nothing outside of Ray."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from samples import ROOT

from ray_synth.generation.cost import reason_label
from ray_synth.metrics import METRICS, exported, join, record, run_name, timed

MONITORING = ROOT / "docs" / "monitoring"
DASHBOARD = MONITORING / "grafana-dashboard.json"
RULES = MONITORING / "alerts.yml"
OURS = re.compile(r"\bray_ray_synth_\w+")


def panels() -> list[dict]:
    return [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] != "row"]


def expressions() -> list[str]:
    """Of the dashboard and of the rules, for all runs."""
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    groups = yaml.safe_load(RULES.read_text())["groups"]
    watched = [rule["expr"] for group in groups for rule in group["rules"]]
    return [expr.replace("$run", ".*") for expr in shown + watched]


def test_what_is_shown_and_watched_is_declared_and_the_reverse():
    named = {name for expr in expressions() for name in OURS.findall(expr)}
    known = {name for metric in METRICS for name in exported(metric)}
    assert named <= known, "the dashboard or a rule asks for what nobody records"
    unseen = [metric for metric in METRICS if not named & set(exported(metric))]
    assert not unseen, "recorded, and shown nowhere"


def test_what_is_recorded_is_declared_with_its_tags_and_the_reverse():
    found: dict[str, set[str]] = {}
    for folder in ("ray_synth", "serve"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                name = _called(node) if isinstance(node, ast.Call) else ""
                if name not in ("record", "timed", "make") or not node.args:
                    continue
                first = node.args[0]
                if isinstance(first, ast.Constant) and first.value in METRICS:
                    tags = {word.arg for word in node.keywords if word.arg}
                    found.setdefault(first.value, set()).update(tags)
                elif isinstance(first, ast.Constant) and name == "record":
                    raise AssertionError(f"{path}: {first.value} is not declared")
    assert set(found) == set(METRICS)
    for metric, tags in found.items():
        assert tags <= set(METRICS[metric].tags), metric


def _called(node: ast.Call) -> str:
    """`record` for `record(...)` and for `metrics.record(...)`, not for `stages.record(...)`."""
    function = node.func
    if isinstance(function, ast.Attribute):
        ours = isinstance(function.value, ast.Name) and function.value.id == "metrics"
        return function.attr if ours else ""
    return function.id if isinstance(function, ast.Name) else ""


def test_names_are_those_that_ray_exports():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), "Ray adds it to counters"
    assert exported("checkpoint_seconds")[1] == "ray_ray_synth_checkpoint_seconds_count"


def test_outside_of_ray_nothing_is_recorded_nor_ray_imported():
    code = (
        "import sys; from ray_synth.metrics import record, timed; record('images_left', 1)\n"
        "with timed('store_write_seconds'): pass\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    join("runs/x")
    record("images_left", 1.0)
    with pytest.raises(KeyError), timed("no_such_figure"):
        pass


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/data/runs/cars", "cars"),
        ("s3://bucket/runs/cars/?region=eu", "cars"),
        ("runs/cars/studies/sources/0a1b2c", "cars/studies"),
        ("/runs/cars/studies/arms", "cars/studies"),
        ("", ""),
    ],
)
def test_runs_are_named_by_few_words(uri, name):
    assert run_name(uri) == name


@pytest.mark.parametrize(
    ("reason", "label"),
    [
        ("clip score 0.18 below 0.21", "clip score"),
        ("the pipeline's safety checker flagged it", "safety checker"),
        ("RuntimeError: at 0x7f00 of prompt 17", "error"),
    ],
)
def test_reasons_are_labels_of_few_values(reason, label):
    assert reason_label(reason) == label


def test_the_dashboard_is_whole():
    dashboard = json.loads(DASHBOARD.read_text())
    rows = [p["title"] for p in dashboard["panels"] if p["type"] == "row"]
    assert rows == [
        "Overview", "Generation", "Training and evaluation", "Meanings and the service", "Cluster",
    ]  # fmt: skip
    variables = {item["name"]: item for item in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not places & mine, f"{panel['title']} lies over another"
        assert at["x"] + at["w"] <= 24
        places |= mine
    for panel in panels():
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            ours = OURS.findall(target["expr"])
            if ours and "run" in METRICS[_metric_of(ours[0])].tags:
                assert 'run=~"$run"' in target["expr"], panel["title"]


def _metric_of(name: str) -> str:
    return next(metric for metric in METRICS if name in exported(metric))


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian: prometheus)")
@pytest.mark.parametrize(
    "line",
    [
        ["check", "rules", str(RULES)],
        ["check", "config", "--syntax-only", str(MONITORING / "prometheus.yml")],
        ["test", "rules", str(ROOT / "tests/monitoring/alerts_test.yml")],
    ],
)
def test_promtool_takes_the_rules_and_their_tests_pass(line):
    done = subprocess.run(["promtool", *line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


VALUES = {"arm": "mixed", "outcome": "rejected", "kind": "fresh", "domain": "real"}
# What the dashboard shows of Ray's own, with the labels that it asks for.
OF_RAY = [
    'ray_serve_num_http_requests_total{application="a"}',
    'ray_serve_num_http_error_requests_total{application="a",error_code="503"}',
    'ray_serve_deployment_queued_queries{deployment="LLM"}',
    *(
        f'ray_node_{name}{{NodeAddress="n"}}'
        for name in (
            "cpu_count", "cpu_utilization", "mem_used", "mem_total", "disk_usage", "disk_free",
        )
    ),
    'ray_node_gpus_utilization{NodeAddress="n",GpuIndex="0"}',
    'ray_object_store_memory{Location="MMAP_SHM"}',
    'ray_actors{State="ALIVE"}',
    'ray_tasks{State="RUNNING"}',
]  # fmt: skip


def recorded() -> list[str]:
    """A series of every metric, with the tags that it is declared with."""
    found = list(OF_RAY)
    for name, metric in METRICS.items():
        tags = ",".join(f'{tag}="{VALUES.get(tag, tag)}"' for tag in metric.tags)
        for seen in exported(name):
            les = ["0.5", "30.0", "+Inf"] if seen.endswith("_bucket") else [None]
            for le in les:
                labels = f'{tags},le="{le}"' if le else tags
                found.append(f"{seen}{{{labels.lstrip(',')}}}")
    return found


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian: prometheus)")
def test_each_expression_of_the_dashboard_finds_series_in_what_is_recorded(tmp_path):
    """PromQL by Prometheus itself: syntax, labels and joins."""
    shown = [target["expr"].replace("$run", ".*") for p in panels() for target in p["targets"]]
    series = [{"series": name, "values": "1+1x120"} for name in recorded()]
    asked = [
        {
            "expr": f"count({expr}) > bool 0",
            "eval_time": "90m",
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        for expr in shown
    ]
    test = {"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": asked}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    line = ["promtool", "test", "rules", str(tmp_path / "test.yml")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
