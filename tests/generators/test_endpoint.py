"""Images from a server: the embedded model behind our own images API, and servers that refuse."""

import base64
import http.client
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pytest
import uvicorn

from ray_synth.config import GenerationConfig
from ray_synth.data.images import encode_array
from ray_synth.errors import UserError
from ray_synth.generators.endpoint import EndpointGenerator
from ray_synth.generators.protocol import Failure
from ray_synth.generators.registry import check_generator, check_plan, filled, fingerprint
from ray_synth.service.images_app import Painter, images_api

PNG = encode_array(np.zeros((8, 8, 3), np.uint8) + 7)
ROW = {"sample_id": "s", "prompt": "the number 7", "negative_prompt": "", "seed": 5}


def config_of(url: str, **settings) -> GenerationConfig:
    kwargs = {"base_url": url, **settings.pop("kwargs", {})}
    values = {"generator": "endpoint", "model": "embedded", "width": 64, "height": 64, **settings}
    return GenerationConfig.model_validate({**values, "generator_kwargs": kwargs})


def row(seed: int, prompt: str = ROW["prompt"]) -> dict:
    return {**ROW, "seed": seed, "prompt": prompt, "class_name": "seven", "meaning": "seven"}


@pytest.fixture(scope="module")
def served():
    """The embedded model behind the images API; (url, painter)."""
    config = filled(GenerationConfig(batch_size=4))
    painter = Painter(config)
    app = images_api(config, painter)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1", painter
    server.should_exit = True
    thread.join(10)


def test_it_gives_the_images_that_the_model_itself_makes(served):
    url, painter = served
    rows = [row(seed, f"the number {seed}") for seed in range(5)]
    found = EndpointGenerator(config_of(url)).generate(rows)
    alone = painter.generator.generate(rows)
    for image, same in zip(found, alone, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(same))
    assert painter.batches.items > painter.batches.batches, "requests share batches"


def test_a_setting_that_the_server_does_not_take_is_left_out(served, caplog):
    url, _ = served
    generator = EndpointGenerator(config_of(url, num_inference_steps=50))
    assert generator.generate([row(1)])[0].size == (64, 64)
    assert "does not take num_inference_steps; asking without" in caplog.text
    assert generator.provenance["sent"] == ["seed", "negative_prompt", "guidance_scale"]
    caplog.clear()
    generator.generate([row(2)])
    assert "does not take" not in caplog.text, "it is said once"


def test_a_wrong_model_size_or_server_is_told(served):
    url, _ = served
    with pytest.raises(UserError, match="does not know 'other'.*the model here is 'embedded'"):
        EndpointGenerator(config_of(url, model="other")).generate([row(1)])
    with pytest.raises(UserError, match="refuses the request: .*the size here is 64x64"):
        EndpointGenerator(config_of(url, width=128)).generate([row(1)])
    gone = config_of("http://127.0.0.1:9/v1")
    generator = EndpointGenerator(gone)
    generator._client = generator._client.with_options(max_retries=0)
    with pytest.raises(UserError, match=r"cannot be reached .* check generation\.generator_kwargs"):
        generator.generate([row(1)])


def test_a_token_is_asked_for_where_one_is_set(served, monkeypatch):
    url, _ = served
    monkeypatch.setenv("RAY_SYNTH_SERVE_TOKEN", "secret\n")
    with pytest.raises(UserError, match="refuses the token: set the environment variable MY_TOKEN"):
        EndpointGenerator(config_of(url, kwargs={"api_key_env": "MY_TOKEN"})).generate([row(1)])
    monkeypatch.setenv("MY_TOKEN", "secret")
    generator = EndpointGenerator(config_of(url, kwargs={"api_key_env": "MY_TOKEN"}))
    assert generator.generate([row(1)])[0].size == (64, 64)


def test_the_server_reads_no_body_before_it_knows_the_caller_and_the_size(served, monkeypatch):
    def status(**headers: str) -> int:
        connection = http.client.HTTPConnection(urlsplit(served[0]).netloc, timeout=20)
        connection.putrequest("POST", "/v1/images/generations")
        for name, value in {"Content-Length": "1000000000", **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()  # and nothing of the body
        return connection.getresponse().status

    assert status() == 413
    monkeypatch.setenv("RAY_SYNTH_SERVE_TOKEN", "secret")
    assert status() == 401
    assert status(Authorization="bearer secret") == 413


@contextmanager
def answering(*answers: tuple[int, dict]):
    """A server that gives these answers one after the other, the last one for ever; and what it heard."""
    heard: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, answer = answers[min(len(heard), len(answers) - 1)]
            heard.append(body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", heard
    server.shutdown()


def image(data: bytes = PNG) -> tuple[int, dict]:
    return 200, {"created": 1, "data": [{"b64_json": base64.b64encode(data).decode()}]}


def error(status: int, message: str, **more) -> tuple[int, dict]:
    return status, {"error": {"message": message, "type": "x", "param": None, "code": None, **more}}


def test_a_safety_refusal_costs_its_row_alone_and_is_named():
    refusal = error(400, "rejected by the safety system", code="content_policy_violation")
    with answering(image(), refusal, image()) as (url, _):
        generator = EndpointGenerator(config_of(url, kwargs={"max_concurrency": 1}))
        made = generator.generate([row(1), row(2), row(3)])
    assert isinstance(made[1], Failure)
    assert made[1].startswith("safety checker of the server: ")
    assert [getattr(item, "size", None) for item in made] == [(8, 8), None, (8, 8)]


def test_a_server_that_names_the_argument_in_its_text_alone_is_understood():
    strange = error(400, "Unknown parameter: 'response_format'.")
    with answering(strange, image()) as (url, heard):
        assert EndpointGenerator(config_of(url)).generate([row(1)])[0].size == (8, 8)
    assert "response_format" in heard[0]
    assert "response_format" not in heard[1]
    assert heard[1]["seed"] == 5 - 4


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (image(b"<html>not a picture"), "the server sent no readable image"),
        ((200, {"created": 1, "data": [{"b64_json": "&&&"}]}), "no readable image"),
        ((200, {"created": 1, "data": []}), "the server sent no image"),
    ],
)
def test_an_answer_that_is_no_picture_fails_its_row(answer, says):
    with answering(answer) as (url, _):
        (made,) = EndpointGenerator(config_of(url)).generate([row(1)])
    assert isinstance(made, Failure) and says in made


def test_an_address_instead_of_an_image_is_not_fetched():
    with (
        answering((200, {"created": 1, "data": [{"url": "http://169.254.169.254/x"}]})) as (url, _),
        pytest.raises(UserError, match="answers with addresses of images, which are not fetched"),
    ):
        EndpointGenerator(config_of(url)).generate([row(1)])


def test_a_busy_server_is_asked_again():
    with answering(error(429, "slow down"), error(503, "starting"), image()) as (url, heard):
        assert EndpointGenerator(config_of(url)).generate([row(1)])[0].size == (8, 8)
    assert len(heard) == 3


def test_what_is_wrong_is_told_before_anything_is_spent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"needs generation\.model.*base_url"):
        check_generator(GenerationConfig(generator="endpoint"))
    with pytest.raises(UserError, match="no token for the images of 'gpt-image-1'"):
        check_generator(GenerationConfig(generator="endpoint", model="gpt-image-1"))
    with pytest.raises(UserError, match="base_ulr"):
        check_generator(config_of("http://x/v1", kwargs={"base_ulr": 1}))
    priced = {"price_per_image": 0.02, "budget": 10}
    check_plan(config_of("http://x/v1", kwargs=priced), 500)
    with pytest.raises(UserError, match=r"501 images at 0\.02, 10\.02 in all, and .*budget is 10"):
        check_plan(config_of("http://x/v1", kwargs=priced), 501)
    retry = config_of("http://x/v1", kwargs={"max_images": 100}, checks={"policy": "retry"})
    with pytest.raises(UserError, match="34 images with up to 3 tries each, and .*max_images"):
        check_plan(retry, 34)


def test_the_servers_address_is_no_part_of_an_image(monkeypatch):
    assert fingerprint(config_of("http://a/v1")) == fingerprint(config_of("http://b/v1"))
    assert fingerprint(config_of("http://a/v1")) != fingerprint(config_of("http://a/v1", model="m"))
