"""The disambiguation service over HTTP, with its real models: answers, refusals, batching."""

import base64
import json
import socket
import threading
import urllib.error
import urllib.request

import pytest

from ray_synth.config import ClipConfig, LlmConfig, SourceConfig
from ray_synth.data.dataset import load_index, read_index, select


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def url(local_ray):
    from ray import serve

    from serve.app import Limits, ServeConfig, build

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    config = ServeConfig(
        llm=LlmConfig(num_cpus=0.5),
        clip=ClipConfig(num_cpus=0.5),
        limits=Limits(max_body_bytes=2_000_000, max_images=20, max_pixels=1_000_000),
    )
    serve.run(build(config), name="test", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def sevens() -> list[str]:
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    index = select(load_index(SourceConfig(format="digits", split="test"), names), 8, seed=0)
    rows = [row for row in read_index(index) if row["class_index"] == 7]
    return [base64.b64encode(row["image"]).decode() for row in rows]


def ask(url: str, path: str, body: object = None, raw: bytes | None = None) -> tuple[int, dict]:
    data = raw if raw is not None else (None if body is None else json.dumps(body).encode())
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=180) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_sevens_are_resolved_with_scores(url, sevens):
    status, entry = ask(
        url, "/disambiguate", {"class_name": "seven", "images": sevens, "num_meanings": 3}
    )
    assert status == 200, entry
    assert entry["class_name"] == "seven"
    assert entry["num_images"] == 8
    assert entry["choice"] == entry["candidates"][0]["meaning"]
    scores = [candidate["score"] for candidate in entry["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert {"llm", "name"} <= {candidate["source"] for candidate in entry["candidates"]}
    assert entry["raw_answers"]


def test_the_callers_meanings_are_ranked_too(url, sevens):
    body = {
        "class_name": "seven",
        "images": sevens,
        "num_meanings": 1,
        "meanings": ["the digit seven, a handwritten numeral", "a large wading bird"],
    }
    status, entry = ask(url, "/disambiguate", body)
    assert status == 200
    scores = {c["meaning"]: c["score"] for c in entry["candidates"] if c["source"] == "user"}
    assert len(scores) == 2
    assert max(scores, key=scores.get).startswith("the digit seven")


def test_prompts_come_with_their_source(url):
    status, found = ask(
        url,
        "/prompts",
        {"class_name": "crane", "meaning": "a large wading bird", "contextual": 3, "stylized": 2},
    )
    assert status == 200
    assert len(found["contextual"]) == 3
    assert len({item["style"] for item in found["stylized"]}) == 2
    for item in [*found["contextual"], *found["stylized"]]:
        assert "crane" in item["prompt"]
        assert "wading bird" in item["prompt"]
    assert {item["source"] for item in found["contextual"]} <= {"llm", "pool"}


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"images": []}, 422, "images"),
        ({"images": ["!!!"]}, 422, "images[0]: not base64"),
        ({"images": [base64.b64encode(b"hello").decode()]}, 422, "images[0]: not a readable image"),
        ({"images": ["aGk="] * 30}, 422, "at most 20"),
        ({"class_name": "  "}, 422, "class_name"),
        ({"clas_name": "x"}, 422, "clas_name"),
        ({"num_meanings": 1000}, 422, "num_meanings"),
        ({"images": "x"}, 422, "images"),
    ],
)
def test_malformed_input_is_told_what_is_wrong(url, sevens, change, status, says):
    body = {"class_name": "seven", "images": sevens[:1], **change}
    got, answer = ask(url, "/disambiguate", body)
    assert got == status
    assert says in json.dumps(answer)


def test_a_hundred_megabytes_are_refused_and_the_service_goes_on(url):
    status, answer = ask(url, "/disambiguate", raw=b'{"class_name": "' + b"x" * 100_000_000 + b'"}')
    assert status == 413
    assert "over the limit" in answer["detail"]
    assert ask(url, "/disambiguate", raw=b"{not json")[0] == 422
    assert ask(url, "/healthz") == (200, {"status": "ok"})


def test_questions_asked_together_share_batches(url, sevens):
    before = ask(url, "/models")[1]["llm"]
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(
                ask(
                    url,
                    "/disambiguate",
                    {"class_name": "seven", "images": sevens[:2], "num_meanings": 2},
                )
            )
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in results] == [200] * 8
    assert len({json.dumps(entry) for _, entry in results}) == 1, (
        "the same question, the same answer"
    )
    after = ask(url, "/models")[1]["llm"]
    calls = (
        after["batches"] * after["mean_batch_size"] - before["batches"] * before["mean_batch_size"]
    )
    assert calls / (after["batches"] - before["batches"]) >= 3


def test_a_token_is_required_where_one_is_set(monkeypatch):
    from fastapi.testclient import TestClient

    from serve.app import TOKEN_VARIABLE, api

    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    client = TestClient(api)
    assert client.post("/disambiguate", json={}).status_code == 401
    assert (
        client.post("/prompts", json={}, headers={"authorization": "Bearer no"}).status_code == 401
    )


def test_a_misspelt_setting_of_the_app_is_refused():
    from pydantic import ValidationError

    from serve.app import ServeConfig

    with pytest.raises(ValidationError, match="modle"):
        ServeConfig.model_validate({"llm": {"modle": "x"}})
