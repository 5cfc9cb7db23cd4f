"""A real run on a Ray head, scraped by a real Prometheus: what is shown and watched is there."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from head import end_tree, ray_synth, start_head
from service import free_port
from small_runs import NO_LLM, ROOT, SMALL, arguments
from test_metrics import DASHBOARD, MONITORING, OURS, expressions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Debian's package prometheus"),
]
SETTINGS = [
    *SMALL,
    *NO_LLM[:2],
    "prompting.multiplier=16",
    "generation.num_inference_steps=12",
    "generation.checks.policy=flag",
    "generation.checks.clip_quantile=0.9",  # of real images: most synthetic ones are flagged
    "training.steps=150",
    "training.log_every=5",
]
# What only trouble counts; the service over HTTP, which a run asks through its handle; and a stage that
# may be over before Ray's next export.
QUIET = re.compile(
    "storage_retries|ray_serve_|request_seconds|questions|refused|meanings_|synth_images_total"
    "|evaluated_images"
)


@pytest.fixture(scope="module")
def head():
    """A head node with its dashboard; its environment and folder."""
    # The run is short.
    with start_head(num_cpus=4, RAY_metrics_report_interval_ms="2000") as started:
        yield {**started.env, "RAY_ADDRESS": started.address}, started.folder


class Prometheus:
    def __init__(self, folder: Path, discovery: Path) -> None:
        config = (MONITORING / "prometheus.yml").read_text()
        config = config.replace("/tmp/ray/prom_metrics_service_discovery.json", str(discovery))
        config = config.replace("- alerts.yml", f"- {MONITORING / 'alerts.yml'}")
        assert str(discovery) in config and str(MONITORING) in config
        (folder / "prometheus.yml").write_text(config.replace(": 15s", ": 3s"))
        self.port = free_port()
        self.log = (folder / "prometheus.log").open("w")
        self.process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ask(self, path: str, **parameters) -> dict:
        query = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def until(self, condition, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if condition():
                    return True
            except (OSError, AssertionError):
                pass
            time.sleep(1)
        return False


@pytest.fixture(scope="module")
def scraped(head, tmp_path_factory):
    """A Prometheus that saw a whole run; asks (expression) -> series over the run."""
    env, temporary = head
    folder = tmp_path_factory.mktemp("prometheus")
    prometheus = Prometheus(folder, temporary / "prom_metrics_service_discovery.json")
    try:
        assert prometheus.until(
            lambda: prometheus.ask("query", query='up{job="ray"} == 1')["data"]["result"], 240
        ), (folder / "prometheus.log").read_text()[-3000:]
        started = time.time()
        done = ray_synth(env, *arguments("run", folder / "runs", *SETTINGS))
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        prometheus.until(
            lambda: prometheus.ask("query", query="ray_ray_synth_evaluated_images_total")["data"][
                "result"
            ],
            20,
        )

        def series(expression: str) -> list[dict]:
            span = {"start": started, "end": time.time(), "step": 3}
            return prometheus.ask("query_range", query=expression, **span)["data"]["result"]

        yield prometheus, series
    finally:
        end_tree(prometheus.process.pid)
        prometheus.process.wait()
        prometheus.log.close()


def test_every_expression_is_understood(scraped):
    _, series = scraped
    for expression in expressions():
        series(expression)


def test_what_the_dashboard_shows_of_a_run_is_there(scraped):
    _, series = scraped
    empty, row = [], ""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        for target in panel["targets"]:
            expression = target["expr"].replace("$run", ".*")
            if not QUIET.search(expression) and not series(expression):
                empty.append((row, panel["title"], expression))
    assert {row for row, *_ in empty} <= {"Cluster"}, empty  # this machine has no GPU


def test_what_the_rules_watch_is_there_and_none_of_them_fails(scraped):
    prometheus, series = scraped
    names = {name for expression in expressions() for name in OURS.findall(expression)}
    missing = [n for n in sorted(names) if not QUIET.search(n) and not series(n)]
    assert not missing
    groups = prometheus.ask("rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert not [rule["name"] for rule in rules if rule["state"] == "firing"], "nothing stalled"


def test_counts_and_labels_are_those_of_the_run(scraped):
    _, series = scraped

    def last(expression: str) -> float:
        found = series(expression)
        return float(found[0]["values"][-1][1]) if found else 0.0

    for figure in ("generated_images_total", "training_steps_total", "training_loss"):
        assert {one["metric"]["run"] for one in series(f"ray_ray_synth_{figure}")} == {"quickstart"}
    # A process that ends takes what it counted since the last export with it, and adds nothing.
    assert 0 < last("sum(ray_ray_synth_generated_images_total)") <= 128
    for arm in ("real_only", "mixed"):
        steps = last(f'sum(ray_ray_synth_training_steps_total{{arm="{arm}"}})')
        assert 0 < steps <= 150 and steps % 5 == 0
        for domain, size in (("real", 5), ("synthetic", 11 * (arm == "mixed"))):
            tags = f'{{arm="{arm}",domain="{domain}"}}'
            assert last(f"sum(ray_ray_synth_training_images_total{tags})") == size * steps
