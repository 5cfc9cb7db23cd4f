"""The service under load: replicas killed, configs redeployed, replicas that follow their queue."""

import asyncio
import base64
import threading
import time

import pytest
from service import DIGITS, digit_images, free_port

from ray_synth.config import ClipConfig, ClusterConfig, LlmConfig
from ray_synth.service.client import Client

pytestmark = pytest.mark.slow
NUMBERS = [f"the number {name}" for name in DIGITS]


@pytest.fixture
def served(monkeypatch):
    """A function that deploys the app with these settings, and returns its address."""
    for source in ("REPLICA", "HANDLE"):  # what autoscaling uses is reported every second
        monkeypatch.setenv(f"RAY_SERVE_{source}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
    from ray import serve

    from ray_synth.cluster.connection import connect
    from ray_synth.service.app import ServeConfig, build
    from ray_synth.service.limits import Limits

    port = free_port()
    with connect(ClusterConfig(num_cpus=8)):
        serve.start(http_options={"host": "127.0.0.1", "port": port})

        def deploy(
            limits: Limits | None = None,
            autoscaling: dict[str, float] | None = None,
            **clip: object,
        ) -> str:
            config = ServeConfig(
                llm=LlmConfig(num_cpus=0.1),
                clip=ClipConfig(num_cpus=0.1, **clip),
                limits=limits or Limits(),
                autoscaling=autoscaling or {},
            )
            serve.run(build(config), name="load", route_prefix="/")
            return f"http://127.0.0.1:{port}"

        yield deploy
        serve.shutdown()


def replicas(deployment: str) -> list[str]:
    from ray import serve

    status = serve.status().applications["load"].deployments[deployment]
    return [state for state, count in status.replica_states.items() for _ in range(count)]


def kill_a_replica(deployment: str) -> None:
    import ray
    from ray.util import list_named_actors

    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    alive = [name for name in names if f"#{deployment}#" in name]
    assert alive, names
    ray.kill(ray.get_actor(alive[0], namespace="serve"))


class Load:
    """Threads that ask without a pause; each answer is compared with the right one."""

    def __init__(self, url: str, threads: int) -> None:
        self.url = url
        self.truth: dict[int, dict] = {}
        self.asked = self.right = 0
        self.wrong: list[object] = []
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.client = Client(url, timeout_s=120, retries=8)
        self.questions = [
            {"images": digit_images(name, 4), "meanings": NUMBERS, "num_meanings": 0}
            for name in DIGITS
        ]
        self.threads = [threading.Thread(target=self.run, args=(i,)) for i in range(threads)]

    def learn(self) -> None:
        """The answers of an undisturbed service."""
        for label, question in enumerate(self.questions):
            self.truth[label] = self.client.disambiguate(DIGITS[label], **question).model_dump()

    def run(self, number: int) -> None:
        label = number % 10
        while not self.stop.is_set():
            label = (label + 1) % 10
            with self.lock:
                self.asked += 1
            try:
                answer = self.client.disambiguate(DIGITS[label], **self.questions[label])
                same = _alike(answer.model_dump(), self.truth[label])
            except Exception as error:
                same, answer = False, error
            with self.lock:
                self.right += same
                if not same:
                    self.wrong.append(answer)


def _alike(one: dict, other: dict) -> bool:
    """Equal but for the rounding of batches of another size."""
    scores = [{c["meaning"]: c["score"] for c in answer["candidates"]} for answer in (one, other)]
    near = all(abs(scores[0][m] - scores[1].get(m, 9)) < 1e-4 for m in scores[0])
    return near and one["choice"] == other["choice"] and one["class_name"] == other["class_name"]


def test_two_minutes_at_saturation_with_replicas_killed_and_a_new_config(served):
    from ray_synth.service.limits import Limits

    url = served(cache_images=0, replicas=2)
    load = Load(url, threads=24)
    load.learn()
    assert [answer["choice"] for answer in load.truth.values()] == NUMBERS
    started = time.monotonic()
    for thread in load.threads:
        thread.start()
    time.sleep(20)
    kill_a_replica("CLIP")
    time.sleep(20)
    kill_a_replica("Disambiguation")
    time.sleep(20)
    served(limits=Limits(max_images=32), cache_images=0, replicas=2, max_batch_size=32)
    time.sleep(max(0, 120 - (time.monotonic() - started)))
    load.stop.set()
    for thread in load.threads:
        thread.join(180)
    print(f"{load.asked} asked, {load.right} right, {load.client.retried} asked again")
    assert not any(thread.is_alive() for thread in load.threads)
    assert load.wrong == []
    assert load.right == load.asked > 200
    assert load.client.limits().max_images == 32


def test_a_rolling_update_fails_no_request_even_without_retries(served):
    from ray_synth.service.limits import Limits

    url = served(cache_images=0, replicas=2)
    load = Load(url, threads=8)
    load.client = Client(url, timeout_s=120, retries=0)
    load.learn()
    for thread in load.threads:
        thread.start()
    time.sleep(5)
    served(limits=Limits(max_images=32), cache_images=0, replicas=2, max_batch_size=32)
    time.sleep(10)
    load.stop.set()
    for thread in load.threads:
        thread.join(180)
    print(f"{load.asked} asked, {load.right} right")
    assert load.wrong == []
    assert load.right == load.asked > 20


def test_replicas_go_up_under_load_and_down_after(served):
    quick = {
        "target_ongoing_requests": 2,
        "upscale_delay_s": 2,
        "downscale_delay_s": 5,
        "look_back_period_s": 11,
    }
    url = served(cache_images=0, replicas=[1, 3], autoscaling=quick)
    assert len(replicas("CLIP")) == 1
    load = Load(url, threads=16)
    load.learn()
    for thread in load.threads:
        thread.start()
    most = 1
    deadline = time.monotonic() + 90
    while most < 3 and time.monotonic() < deadline:
        most = max(most, replicas("CLIP").count("RUNNING"))
        time.sleep(1)
    load.stop.set()
    for thread in load.threads:
        thread.join(180)
    assert most == 3
    assert load.wrong == []
    deadline = time.monotonic() + 120
    while replicas("CLIP") != ["RUNNING"] and time.monotonic() < deadline:
        time.sleep(1)
    assert replicas("CLIP") == ["RUNNING"]


def test_too_many_waiting_requests_are_turned_away_at_once(served):
    """Beyond its queue the service answers 503, with a problem or Serve's own words, and goes on."""
    import httpx

    from ray_synth.service.limits import Limits

    url = served(limits=Limits(max_queued_requests=1))
    image = base64.b64encode(digit_images("seven", 1)[0]).decode()
    body = {"class_name": "seven", "images": [image], "num_meanings": 3}

    async def flood() -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            answers = await asyncio.gather(
                *(client.post("/disambiguate", json={**body, "seed": i}) for i in range(40))
            )
        return [answer.status_code for answer in answers]

    assert set(asyncio.run(flood())) <= {200, 503}
    assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200
