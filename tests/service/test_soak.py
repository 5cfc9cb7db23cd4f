"""A soak: honest callers among slow, huge, thin and dropped requests. 5 minutes; see MINUTES."""

import base64
import contextlib
import io
import itertools
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from statistics import median, quantiles
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from PIL import Image
from service import DIGITS, digit_images, free_port

from ray_synth.config import ClipConfig, ClusterConfig, LlmConfig

MINUTES = float(os.environ.get("RAY_SYNTH_SOAK_MINUTES", "5"))
HONEST = 3  # callers at once
PAUSE_S = 0.3  # between a caller's questions
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * (MINUTES + 10))]


@pytest.fixture
def url():
    from ray import serve

    from ray_synth.cluster.connection import connect
    from ray_synth.service.app import ServeConfig, build
    from ray_synth.service.request_ids import PROXY_CALLBACK

    port = free_port()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name, value in PROXY_CALLBACK.items():
            patch.setenv(name, value)
        stack.enter_context(connect(ClusterConfig(num_cpus=4)))
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        config = ServeConfig(
            llm=LlmConfig(num_cpus=0.5), clip=ClipConfig(num_cpus=0.5, cache_images=0)
        )
        serve.run(build(config), name="test", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


def encoded(image: Image.Image, image_format: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return base64.b64encode(buffer.getvalue()).decode()


def question(images: list[str], name: str = "seven") -> dict:
    meanings = [f"the number {digit}" for digit in DIGITS]
    return {"class_name": name, "images": images, "meanings": meanings, "num_meanings": 0}


class Soak:
    """Threads that ask until they are told to stop, and what the honest ones saw."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.parts = urlsplit(url)
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []
        self.lock = threading.Lock()
        self.seconds: list[float] = []
        self.wrong: list[object] = []
        self.sent: dict[str, int] = {}
        self.sevens = [base64.b64encode(data).decode() for data in digit_images("seven")]

    def start(self, work: Callable[[random.Random], None], pause_s: float, count: int = 1) -> None:
        def run(number: int) -> None:
            rng = random.Random(number)
            while not self.stop.wait(pause_s * rng.uniform(0.5, 1.5)):
                with contextlib.suppress(OSError, httpx.HTTPError):
                    work(rng)
                    with self.lock:
                        self.sent[work.__name__] = self.sent.get(work.__name__, 0) + 1

        for number in range(count):
            thread = threading.Thread(target=run, args=(number,), daemon=True)
            thread.start()
            self.threads.append(thread)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)

    def honest(self, rng: random.Random) -> None:
        started = time.monotonic()
        try:
            answer = httpx.post(f"{self.url}/disambiguate", json=question(self.sevens), timeout=60)
            right = answer.status_code == 200 and answer.json()["choice"] == "the number seven"
        except httpx.HTTPError as error:
            answer, right = error, False
        with self.lock:
            self.seconds.append(time.monotonic() - started)
            if not right:
                self.wrong.append(getattr(answer, "text", answer))

    def _open(self, length: int) -> socket.socket:
        connection = socket.create_connection((self.parts.hostname, self.parts.port), timeout=30)
        connection.sendall(
            b"POST /disambiguate HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length
        )
        return connection

    def slow(self, rng: random.Random) -> None:
        """A body of which a few bytes come each second."""
        with self._open(30_000_000) as connection:
            while not self.stop.wait(1):
                connection.sendall(b"x" * 5)

    def held(self, rng: random.Random) -> None:
        """A large body that stops before its end."""
        with self._open(30_000_000) as connection:
            connection.sendall(b" " * 8_000_000)
            self.stop.wait(5)

    def huge(self, rng: random.Random) -> None:
        """40 million pixels in 50 kB."""
        httpx.post(f"{self.url}/disambiguate", json=question([HUGE]), timeout=60)

    def thin(self, rng: random.Random) -> None:
        httpx.post(f"{self.url}/disambiguate", json=question([THIN] * 8), timeout=60)

    def dropped(self, rng: random.Random) -> None:
        """Gone before the body's end, or before the answer."""
        body = b'{"class_name": "seven", "images": ["%s"]}' % self.sevens[0].encode()
        with self._open(len(body)) as connection:
            connection.sendall(body[: rng.choice([5, len(body) // 2, len(body)])])

    def broken(self, rng: random.Random) -> None:
        httpx.post(f"{self.url}/disambiguate", content=b"{not json" * 1000, timeout=60)


HUGE = encoded(Image.new("P", (8000, 5000)))
THIN = encoded(Image.new("L", (5000, 1)))


KIND = re.compile(r"ServeReplica:\w+:\w+|ProxyActor")


def memory_of_serve() -> dict[str, int]:
    """Bytes of the replicas and of the proxy: what they hold themselves, not what they share."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            kind = KIND.search(" ".join(process.info["cmdline"] or []))
            if kind:  # the title goes on with what the process is at
                memory = process.memory_info()
                found[kind[0]] = memory.rss - memory.shared
    return found


def p95(seconds: list[float]) -> float:
    return quantiles(seconds, n=20)[-1]


def test_honest_callers_do_not_feel_the_others_and_memory_is_flat(url):
    soak = Soak(url)
    for _ in range(5):
        soak.honest(random.Random(0))
    soak.seconds.clear()
    soak.start(soak.honest, PAUSE_S, HONEST)
    time.sleep(60 * MINUTES / 4)
    with soak.lock:
        alone = list(soak.seconds)
        soak.seconds.clear()
    soak.start(soak.slow, 0.5, 30)
    soak.start(soak.held, 2, 4)
    soak.start(soak.huge, 3)
    soak.start(soak.thin, 2)
    soak.start(soak.dropped, 0.3)
    soak.start(soak.broken, 1)
    sizes = []
    ends = time.monotonic() + 60 * MINUTES * 3 / 4
    warm = time.monotonic() + min(60, 60 * MINUTES / 4)  # pools and caches fill
    for _ in itertools.takewhile(lambda _: time.monotonic() < ends, itertools.count()):
        time.sleep(1)
        if time.monotonic() > warm:
            sizes.append(memory_of_serve())
    soak.end()
    quarter = len(sizes) // 4
    for kind in sizes[-1]:
        parts = [
            median(size.get(kind, 0) for size in some)
            for some in (sizes[:quarter], sizes[-quarter:])
        ]
        print(f"{kind}: {parts[0] / 1e6:.0f} MB, at the end {parts[1] / 1e6:.0f} MB")
    sums = [sum(size.values()) for size in sizes]
    first, last = median(sums[:quarter]), median(sums[-quarter:])
    print(
        f"{len(alone)} honest alone, p95 {p95(alone):.2f} s; {len(soak.seconds)} among others, p95 "
        f"{p95(soak.seconds):.2f} s; memory {first / 1e6:.0f} MB, at the end {last / 1e6:.0f} MB, at "
        f"most {max(sums) / 1e6:.0f} MB; {soak.sent}"
    )
    assert soak.wrong == []
    assert all(soak.sent.get(kind) for kind in ("huge", "thin", "dropped", "broken", "held"))
    assert 0.9 <= last / first <= 1.1
    assert p95(soak.seconds) <= 2 * p95(alone)
    assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200


def test_a_class_list_of_hundreds_keeps_no_other_caller_waiting(url):
    """The language model is asked thousands of questions by one, and a few by the other."""
    sevens = [base64.b64encode(data).decode() for data in digit_images("seven", 2)]
    classes = [{"class_name": f"seven {i}", "images": sevens} for i in range(200)]
    lines = 0

    def take_lines() -> None:
        nonlocal lines
        asked = {"classes": classes, "num_meanings": 5}
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", f"{url}/disambiguate/batch", json=asked, timeout=300) as stream,
        ):
            for _ in stream.iter_lines():
                lines += 1
                if done.is_set():
                    return

    done = threading.Event()
    thread = threading.Thread(target=take_lines, daemon=True)
    thread.start()
    time.sleep(10)
    seconds = []
    for seed in range(3):
        started = time.monotonic()
        body = {"class_name": "seven", "images": sevens, "num_meanings": 2, "seed": seed}
        answer = httpx.post(f"{url}/disambiguate", json=body, timeout=180)
        assert answer.status_code == 200, answer.text
        seconds.append(time.monotonic() - started)
    done.set()
    print(
        f"{[f'{s:.0f} s' for s in seconds]} beside a list of 200 classes, {lines} of them answered"
    )
    assert thread.is_alive(), "the list was still being worked at"
    assert max(seconds) < 60
