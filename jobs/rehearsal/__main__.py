"""`python -m rehearsal` in `jobs/`, or `make rehearsal`: the ImageNet config, stage by stage.

1,000 classes, 1.28 M real images in a bucket, 7.7 M planned rows, 8 training and 48 generating logical
GPUs; pictures of 32 px, a language model that sleeps, a generator that costs nothing and a tiny
classifier. It is killed twice on the way. What a stage took is printed, and what bounded it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import typer

from ray_synth.stages import STAGES
from rehearsal.cluster import GPUS_PER_NODE, Memory, fake_cluster

JOBS = Path(__file__).resolve().parents[1]
CONFIG = JOBS / "configs" / "imagenet_resnet50.yaml"


def main(
    folder: Annotated[Path, typer.Argument(help="what it leaves")],
    config: Path = CONFIG,
    classes: int = 1_000,
    per_class: Annotated[int, typer.Option(help="real images")] = 1_281,
    generators: Annotated[int, typer.Option(help="logical GPUs that generate")] = 48,
    trainers: Annotated[int, typer.Option(help="training workers")] = 8,
    planned: Annotated[int, typer.Option(help="synthetic images")] = 7_686_000,
    steps: Annotated[int, typer.Option(help="of training")] = 300,
    minutes: Annotated[float, typer.Option(help="for training, and for images after it")] = 30,
    contexts: Annotated[int, typer.Option(help="scenes per class; the config has 200")] = 16,
    latency_ms: Annotated[int, typer.Option(help="of the bucket")] = 5,
) -> None:
    """Rehearse the run; the last line is JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = (
        f"{JOBS}:{JOBS.parent}"  # of all that is started, Ray's workers as well
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.setdefault(name, "none")  # the bucket asks for none
    nodes = -(-(generators + trainers) // GPUS_PER_NODE)
    bucket, language = _port(), _port()
    with (
        _server("rehearsal.bucket", bucket, per_class, latency_ms, classes),
        _server("rehearsal.language_server", language, 0.2),
        fake_cluster(nodes) as address,
        Memory() as memory,
    ):
        settings = _settings(
            folder, address, bucket, language, classes=classes, generators=generators,
            trainers=trainers, steps=steps, contexts=contexts,
            multiplier=planned / (classes * per_class),
        )  # fmt: skip
        run = Rehearsal(folder, config, settings, memory, bucket)
        run.start("meaning", kill=lambda: run.kept("meanings.partial") > classes // 50)
        run.start("training", kill=run.has_checkpoint)
        run.start("training", minutes=minutes)
        run.start("evaluation")
        print(run.table())
        print(json.dumps({"verb": "rehearsal", **run.figures()}))


class Rehearsal:
    """The command, started and killed; what each of its stages took."""

    def __init__(
        self, folder: Path, config: Path, settings: list[str], memory: Memory, bucket: int
    ) -> None:
        self.folder, self.config, self.settings = folder, config, settings
        self.memory, self.bucket = memory, bucket
        self.run = folder / "runs" / "rehearsal"
        self.rates: dict[str, float] = {}
        self.kills: list[str] = []
        self.tested_s = 0.0

    def start(self, until: str, *, kill: Any = None, minutes: float | None = None) -> None:
        """Run the command up to a stage; kill it where `kill` says so, or when its time is over."""
        words = [item for setting in self.settings for item in ("--set", setting)]
        tested = until == "evaluation"
        verb = ["ray_synth.cli", "run", "--until", until, "--config"]
        line = [sys.executable, "-m", *(["rehearsal.evaluation"] if tested else verb)]
        log = (self.folder / "output.log").open("ab")
        driver = subprocess.Popen(
            [*line, str(self.config), *words], cwd=JOBS.parent, stdout=log, stderr=log
        )
        self.memory.driver = driver.pid
        begun, made = time.monotonic(), self.made()
        try:
            while driver.poll() is None:
                self.memory.stage = until if tested else self.at_work()
                over = minutes is not None and time.monotonic() - begun > 60 * minutes
                if over or (kill is not None and kill()):
                    driver.send_signal(signal.SIGKILL)
                    driver.wait()
                    self.kills.append(self.memory.stage)
                    break
                time.sleep(0.3)
        finally:
            if driver.poll() is None:
                driver.kill()
        seconds = time.monotonic() - begun
        if tested:
            self.tested_s = seconds
        else:
            self.rates[until] = (self.made() - made) / seconds
        if driver.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(
                f"the run ended with {driver.returncode}: see {self.folder}/output.log"
            )

    def kept(self, name: str) -> int:
        """Files in a folder of the run."""
        place = self.run / name
        return sum(1 for _ in os.scandir(place)) if place.is_dir() else 0

    def made(self) -> int:
        """Rows in the store, by the footers of its parts."""
        import pyarrow.parquet as pq

        parts = (self.run / "images").glob("part-*.parquet")
        return sum(pq.read_metadata(part).num_rows for part in parts)

    def has_checkpoint(self) -> bool:
        """Whether the mixed model's training has saved one."""
        return any((self.run / "checkpoints").glob("mixed-*/checkpoint_*"))

    def at_work(self) -> str:
        done = {path.stem for path in (self.run / "stages").glob("*.json")}
        order = [stage for stage in STAGES if stage != "generation"]
        return next((stage for stage in order if stage not in done), "generation")

    def seconds(self) -> dict[str, float]:
        kept = {
            path.stem: json.loads(path.read_text()) for path in (self.run / "stages").glob("*.json")
        }
        found = {name: kept[name]["seconds"] for name in STAGES if name in kept}
        return {**found, **({"evaluation": self.tested_s} if self.tested_s else {})}

    def figures(self) -> dict[str, Any]:
        import pyarrow.parquet as pq

        with urllib.request.urlopen(f"http://127.0.0.1:{self.bucket}/") as answer:
            requests = json.load(answer)
        images = [path.stat().st_size for path in (self.run / "images").glob("part-*.parquet")]
        plan = self.run / "plan.parquet"
        return {
            "seconds": {name: round(value, 1) for name, value in self.seconds().items()},
            "planned": pq.read_metadata(plan).num_rows if plan.exists() else 0,
            "made": self.made(),
            "images_per_second": {k: round(v, 1) for k, v in self.rates.items()},
            "objects": len(images),
            "megabytes": round(sum(images) / 1e6, 1),
            "bucket_requests": requests,
            "killed_in": self.kills,
            "memory_mb": {
                stage: {role: [round(x) for x in peak] for role, peak in peaks.items()}
                for stage, peaks in self.memory.peaks.items()
            },
        }

    def table(self) -> str:
        """Seconds and peak memory of each stage."""
        seconds = self.seconds()
        lines = [f"{'stage':<12} {'s':>8} {'driver MB':>10} {'all MB':>8}  largest by role"]
        for stage in (*STAGES, "start"):
            peaks = self.memory.peaks.get(stage)
            if not peaks:
                continue
            total = sum(peak[1] for peak in peaks.values())
            roles = ", ".join(f"{role} {peak[0]:.0f}" for role, peak in sorted(peaks.items()))
            driver = peaks.get("driver", (0.0, 0.0))[0]
            shown = f"{seconds[stage]:8.0f}" if stage in seconds else f"{'':>8}"
            lines.append(f"{stage:<12} {shown} {driver:>10.0f} {total:>8.0f}  {roles}")
        return "\n".join(lines)


def _settings(
    folder: Path, address: str, bucket: int, language: int, *, classes: int, generators: int,
    trainers: int, steps: int, contexts: int, multiplier: float,
) -> list[str]:  # fmt: skip
    """What is divided, and where things are."""
    options = f"endpoint_override=127.0.0.1:{bucket}&scheme=http&region=us-east-1"

    def source(name: str) -> str:
        return json.dumps(
            {"format": "imagefolder", "path": f"s3://imagenet/{name}?{options}",
             "class_map": "imagenet_wnids"}
        )  # fmt: skip

    from ray_synth.data.imagenet import class_names

    names = list(class_names())
    chosen = "imagenet" if classes == len(names) else json.dumps(_first_classes(classes))
    return [
        "name=rehearsal", f"runs_dir={folder / 'runs'}", f"cluster.address={address}",
        "cluster.max_reach=null", f"data.class_names={chosen}",
        f"data.train={source('train')}", f"data.test={source('val')}",
        f"data.ood={{imagenet_sketch: {source('sketch')}, imagenet_r: {source('r')}}}",
        "meaning.llm={backend: openai, model: sleeper, replicas: 1, "
        f"base_url: 'http://127.0.0.1:{language}/v1'}}",
        "meaning.clip={model: embedded, num_cpus: 0.5, num_gpus: 0.5}",
        f"prompting.contexts_per_class={contexts}", f"prompting.multiplier={multiplier}",
        "generation.num_cpus=0.25", "training.num_cpus=0.25", "evaluation.num_cpus=0.5",
        "generation.generator=rehearsal.painter:Painter", "generation.model=embedded",
        "generation.width=64", "generation.height=64", "generation.checks={policy: off}",
        "generation.compile=false", f"generation.pool={{min_size: 8, max_size: {generators}}}",
        "training.model=test_byobnet", "training.image_size=32", "training.augment=none",
        "training.batch_size=64", "training.accumulate_steps=1", f"training.steps={steps}",
        "training.feed=live",  # of the kept feed's epochs an hour would see nothing
        "training.compile=false", "training.dtype=float32", "training.decode_workers=0",
        f"training.num_workers={trainers}", "training.num_gpus=0", "training.baseline=none",
        "evaluation.num_gpus=0",
        "training.checkpoint_every=50", "tracking.enabled=false",
    ]  # fmt: skip


def _first_classes(count: int) -> list[str]:
    """Names of the classes whose folders come first."""
    from ray_synth.data.imagenet import class_map

    names = class_map("imagenet_wnids")
    return [names[wnid] for wnid in sorted(names)[:count]]


@contextmanager
def _server(module: str, port: int, *words: object) -> Any:
    """A server of this package in a process of its own, ready when its port answers."""
    process = subprocess.Popen([sys.executable, "-m", module, str(port), *map(str, words)])
    try:
        for _ in range(300):
            if process.poll() is not None:
                raise SystemExit(f"{module} ended")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    typer.run(main)
