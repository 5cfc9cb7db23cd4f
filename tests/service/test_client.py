"""The client against a service on a socket that fails in real ways: nothing of httpx is replaced."""

from __future__ import annotations

import io
import json
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from PIL import Image
from samples import draw, encoded
from service import free_port

from ray_synth.cli.command import main
from ray_synth.service.client import Client, ServiceError, ServiceUnavailable, encode_image
from ray_synth.service.client import _backoff as BACKOFF
from ray_synth.service.messages import Answer, BatchBody, DisambiguateBody, Line, Problem

PROBLEM = Problem(title="Unprocessable Content", status=422, detail="images[0]: no", request_id="7")


def answer(name: str) -> Answer:
    return Answer(
        class_name=name, choice="a bird", confidence=1, ambiguous=False, margin=None, candidates=[],
        num_images=1, num_refused=0, raw_answers=[], llm="l", clip="c",
    )  # fmt: skip


def problem_response(problem: Problem) -> JSONResponse:
    body = problem.model_dump(exclude_none=True)
    return JSONResponse(body, problem.status, media_type="application/problem+json")


def make_app(state: SimpleNamespace) -> FastAPI:
    """A service that first gives what is in `state.failures`, and notes what it is asked."""
    app = FastAPI()

    @app.middleware("http")
    async def fail(request: Request, call_next) -> Response:
        body = await request.body()
        state.asked.append(
            (request.url.path, request.headers.get("authorization"), json.loads(body or "null"))
        )
        if state.failures and isinstance(state.failures[0], Response):
            return state.failures.pop(0)
        return await call_next(request)

    @app.post("/disambiguate")
    def disambiguate(body: DisambiguateBody) -> Answer:
        return answer(body.class_name)

    @app.post("/disambiguate/batch")
    def batch(body: BatchBody) -> StreamingResponse:
        lines = [
            Line(class_name=q.class_name, answer=answer(q.class_name)).model_dump_json(
                exclude_none=True
            )
            + "\n"
            for q in body.classes
        ]
        broken = state.failures.pop(0) if state.failures else iter
        return StreamingResponse(broken(lines), media_type="application/x-ndjson")

    @app.post("/prompts")
    def prompts(body: dict) -> dict:
        name = body["class_name"]
        return {"class_name": name, "meaning": name, "contextual": [], "stylized": []}

    @app.get("/models")
    def models() -> dict:
        return {"llm": {"model": "l"}, "clip": {"model": "c"}}

    @app.get("/limits")
    def limits() -> dict:
        names = ("max_images", "max_image_bytes", "max_pixels", "max_body_bytes", "max_classes")
        return {**dict.fromkeys(names, 9), "token_required": True}

    @app.get("/readyz")
    def readyz() -> dict:
        return {"status": "ready"}

    return app


def serve_on(listening: socket.socket, state: SimpleNamespace) -> uvicorn.Server:
    server = uvicorn.Server(uvicorn.Config(make_app(state), log_level="critical"))
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def running():
    state = SimpleNamespace(failures=[], asked=[])
    listening = socket.create_server(("127.0.0.1", 0))
    server = serve_on(listening, state)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", state
    server.should_exit = True


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("ray_synth.service.client._backoff", lambda state: 0.01)


@pytest.fixture
def service(running) -> SimpleNamespace:
    running[1].failures, running[1].asked = [], []
    return running[1]


@pytest.fixture
def client(running) -> Iterator[Client]:
    with Client(running[0], token="secret") as client:
        yield client


def test_answers_are_typed_and_the_token_goes_along(client, service, monkeypatch):
    found = client.disambiguate("crane", [encoded(1)], context="from a list of birds", seed=3)
    assert isinstance(found, Answer) and found.choice == "a bird"
    path, token, body = service.asked[0]
    assert (path, token) == ("/disambiguate", "Bearer secret")
    assert body["context"] == "from a list of birds" and body["seed"] == 3
    assert client.prompts("crane", contextual=0).class_name == "crane"
    assert client.models()["clip"] == {"model": "c"}
    assert client.limits().token_required is True
    assert client.is_ready() and client.retried == 0
    monkeypatch.setenv("RAY_SYNTH_SERVE_TOKEN", "of the environment")
    with Client(client.url + "/") as other:
        other.limits()
    assert service.asked[-1][1] == "Bearer of the environment"


def test_an_image_is_bytes_or_a_path_or_a_picture_or_a_url(client, service, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(1))
    turned = draw(2)
    turned.getexif()[0x0112] = 6  # the camera was held upright
    cmyk = draw(3).convert("CMYK")
    url = "https://pictures.example/a.png"
    client.disambiguate("crane", [encoded(1), path, str(path), turned, cmyk, url])
    sent = service.asked[0][2]["images"]
    assert sent[0] == sent[1] == sent[2] == encode_image(encoded(1))
    assert sent[5] == url
    import base64

    def read(text: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(text)))

    assert read(sent[3]).format == "PNG" and read(sent[3]).size == (20, 24)
    assert read(sent[4]).mode == "RGB"
    for wrong, error in (
        ("no such.png", FileNotFoundError),
        ("http://pictures.example/a.png", ValueError),
        (3, TypeError),
    ):
        with pytest.raises(error):
            client.disambiguate("crane", [wrong])
    with pytest.raises(TypeError, match="list of images"):
        client.disambiguate("crane", encoded(1))


def test_a_busy_service_is_asked_again_after_waits_that_double(client, service, monkeypatch):
    monkeypatch.setattr("ray_synth.service.client._backoff", BACKOFF)
    service.failures = [PlainTextResponse("busy", 503), problem_response(PROBLEM_OF[503])]
    start = time.monotonic()
    assert client.disambiguate("crane").class_name == "crane"
    assert client.retried == 2 and len(service.asked) == 3
    assert time.monotonic() - start >= 0.5 + 1


PROBLEM_OF = {
    status: Problem(title="T", status=status, detail="d", request_id="r")
    for status in (500, 502, 503, 504)
}


@pytest.mark.parametrize("status", [401, 413, 422, 429, 501])
def test_no_other_answer_is_questioned(client, service, status):
    problem = PROBLEM if status == 422 else Problem(title="T", status=status, detail="d")
    service.failures = [problem_response(problem)]
    with pytest.raises(ServiceError) as error:
        client.disambiguate("crane")
    assert error.value.problem == problem
    assert client.retried == 0
    if status == 422:
        assert str(error.value) == "Unprocessable Content: images[0]: no (request 7)"
        again = pickle.loads(pickle.dumps(error.value))  # as Ray does between processes
        assert again.problem == PROBLEM and str(again) == str(error.value)


@pytest.mark.parametrize("status", PROBLEM_OF)
def test_the_last_problem_is_raised_when_it_does_not_pass(running, service, status):
    service.failures = [problem_response(PROBLEM_OF[status]) for _ in range(5)]
    with Client(running[0], retries=1) as client, pytest.raises(ServiceError, match="T: d") as e:
        client.disambiguate("crane")
    assert e.value.problem.status == status
    assert client.retried == 1 and len(service.failures) == 3


def test_a_gateways_page_is_told_as_a_problem(client, service):
    page = PlainTextResponse("<html>\n  no such route</html>", 404, {"x-request-id": "g1"})
    service.failures = [page]
    with pytest.raises(ServiceError, match="Not Found: <html> no such route") as error:
        client.limits()
    assert error.value.problem.request_id == "g1"
    service.failures = [PlainTextResponse("welcome"), JSONResponse({"max_images": "many"})]
    for _ in range(2):
        with pytest.raises(ServiceError, match="Not an answer that this client knows"):
            client.limits()


def test_retry_after_is_waited_for_but_not_for_ever(client, service):
    service.failures = [PlainTextResponse("", 503, {"retry-after": "2"})]
    start = time.monotonic()
    client.limits()
    assert time.monotonic() - start >= 2
    service.failures = [PlainTextResponse("", 503, {"retry-after": "3600"})]
    with pytest.raises(ServiceError, match="Service Unavailable"):
        client.limits()
    assert client.retried == 1


def test_a_dropped_connection_is_asked_again(service):
    """The first connection is closed in the middle of the question; then the service is there."""
    listening = socket.create_server(("127.0.0.1", 0))
    servers = []

    def drop_one() -> None:
        connection, _ = listening.accept()
        connection.recv(100)
        connection.close()
        servers.append(serve_on(listening, service))

    threading.Thread(target=drop_one, daemon=True).start()
    with Client(f"http://127.0.0.1:{listening.getsockname()[1]}") as client:
        assert client.disambiguate("crane", [encoded(1)]).choice == "a bird"
        assert client.retried == 1
    servers[0].should_exit = True


def test_a_service_that_never_answers_is_a_connection_error():
    with Client(f"http://127.0.0.1:{free_port()}", retries=1) as client:
        assert client.is_ready() is False
        with pytest.raises(ServiceUnavailable, match="cannot be reached") as error:
            client.limits()
        assert client.retried == 1
        with pytest.raises(ServiceUnavailable):
            next(client.disambiguate_batch({"crane": []}))
    assert isinstance(error.value, ConnectionError)
    assert isinstance(pickle.loads(pickle.dumps(error.value)), ServiceUnavailable)
    silent = socket.create_server(("127.0.0.1", 0))
    with Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2) as client:
        with pytest.raises(ServiceUnavailable, match=r"in time \(ReadTimeout; timeout_s is 0.2"):
            client.limits()
        assert client.retried == 0 and client.is_ready() is False
    silent.close()
    for wrong in ("localhost:8000", "ftp://a", "http://a:b"):
        with pytest.raises(ValueError, match="is not the URL of a service"):
            Client(wrong)


def cut(lines: list[str]) -> Iterator[str]:
    """The stream of a service that dies."""
    yield from lines[:2]
    raise SystemError("dies")


def end_early(lines: list[str]) -> Iterator[str]:
    yield from lines[:2]


def end_within_a_line(lines: list[str]) -> Iterator[str]:
    yield from lines[:2]
    yield lines[2][:30]


@pytest.mark.parametrize("breaks", [cut, end_early, end_within_a_line])
def test_a_broken_stream_goes_on_with_the_classes_that_have_not_come(client, service, breaks):
    service.failures = [breaks]
    classes = {name: [encoded(1)] for name in ("ant", " bee", "cat", "dog")}
    lines = list(client.disambiguate_batch(classes, num_meanings=2))
    assert [line.class_name for line in lines] == ["ant", "bee", "cat", "dog"]
    assert all(line.answer and line.answer.margin is None for line in lines)
    assert client.retried == 1
    bodies = [body for _, _, body in service.asked]
    assert [question["class_name"] for question in bodies[1]["classes"]] == [
        "ant",
        " bee",
        "cat",
        "dog",
    ]
    assert all(body["num_meanings"] == 2 for body in bodies)


def test_a_stream_that_brings_nothing_new_is_given_up(running, service):
    service.failures = [cut, lambda lines: iter(())] + [lambda lines: iter(())] * 3
    with Client(running[0], retries=1) as client:
        lines = client.disambiguate_batch({name: [] for name in ("ant", "bee", "cat")})
        assert [next(lines).class_name, next(lines).class_name] == ["ant", "bee"]
        with pytest.raises(ServiceUnavailable, match="ended before all classes had come"):
            next(lines)
    assert client.retried == 1


def test_a_refused_class_list_is_an_error_and_a_refused_class_a_line(client, service):
    service.failures = [problem_response(PROBLEM)]
    with pytest.raises(ServiceError, match="images\\[0\\]: no"):
        next(client.disambiguate_batch({"ant": []}))
    refused = Line(class_name="ant", problem=PROBLEM).model_dump_json() + "\n"
    service.failures = [lambda lines: iter([refused, lines[1]])]
    first, second = client.disambiguate_batch({"ant": [], "bee": []})
    assert first.problem == PROBLEM and first.answer is None and second.answer
    with pytest.raises(ValueError, match="each class name once"):
        client.disambiguate_batch({"ant": [], "ant ": []})
    with pytest.raises(FileNotFoundError):  # at once, not at the first line
        client.disambiguate_batch({"ant": [Path("no such.png")]})
    assert list(client.disambiguate_batch({})) == [] and client.retried == 0


def test_lines_are_given_as_they_come(client, service):
    gone_on = threading.Event()

    def slow(lines: list[str]) -> Iterator[str]:
        yield lines[0]
        assert gone_on.wait(10)
        yield lines[1]

    service.failures = [slow]
    lines = client.disambiguate_batch({"ant": [], "bee": []})
    assert next(lines).class_name == "ant"
    gone_on.set()
    assert next(lines).class_name == "bee"


def test_threads_share_a_client(client, service):
    service.failures = [PlainTextResponse("", 503) for _ in range(4)]
    found: list[str] = []
    names = [f"class {i}" for i in range(8)]
    threads = [
        threading.Thread(target=lambda n=name: found.append(client.disambiguate(n).class_name))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == names and client.retried == 4


def test_the_command_asks_too(running, service, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_SYNTH_SERVE_TOKEN", "secret")
    image = tmp_path / "a.png"
    image.write_bytes(encoded(1))
    asking = ["serve", "ask", "crane", str(image), "--url", running[0]]
    with pytest.raises(SystemExit) as stopped:
        main([*asking, "--meaning", "a bird", "--context", "from a list of birds"])
    assert not stopped.value.code
    assert json.loads(capsys.readouterr().out)["choice"] == "a bird"
    assert service.asked[0][1] == "Bearer secret"
    assert service.asked[0][2]["meanings"] == ["a bird"]
    service.failures = [problem_response(PROBLEM)]
    for arguments, says in ((asking, "images[0]: no"), ([*asking[:3], "no.png"], "no.png")):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err
