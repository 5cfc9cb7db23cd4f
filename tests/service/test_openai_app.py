"""The app of serve/config_gpu.yaml, beside a server that answers as its model's would."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from samples import ROOT
from service import ask

from ray_synth.service.deploy_config import load_serve_config

SENSE = "the number 7"


@pytest.fixture
def model():
    """A chat server below the path of the app `llm`; the questions that it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            thinks = asked[-1].get("chat_template_kwargs", {}).get("enable_thinking", True)
            message = {"role": "assistant", "content": "<think>\nHm" if thinks else SENSE}
            reply = {
                "id": "1", "object": "chat.completion", "created": 0, "model": asked[-1]["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 90, "completion_tokens": 4, "total_tokens": 94},
            }  # fmt: skip
            known = self.path == "/llm/v1/chat/completions"
            data = json.dumps(reply if known else {}).encode()
            self.send_response(200 if known else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_classes_are_resolved_by_a_model_behind_openais_interface(url, sevens, model):
    from ray import serve

    from ray_synth.service.app import ServeConfig, build

    address, asked = model
    *_, application = load_serve_config(ROOT / "serve/config_gpu.yaml")["applications"]
    values = application["args"]
    values["llm"]["base_url"] = values["llm"]["base_url"].replace("http://127.0.0.1:8000", address)
    values["llm"]["num_cpus"] = 0.5
    values["clip"] = {"num_cpus": 0.5}  # the embedded one, without a GPU
    serve.run(build(ServeConfig(**values)), name="openai", route_prefix="/openai")
    try:
        question = {"class_name": "seven", "images": sevens, "num_meanings": 1}
        status, entry = ask(f"{url}/openai", "/disambiguate", question)
        assert status == 200 and entry["choice"] == SENSE, entry
        status, models = ask(f"{url}/openai", "/models")
        assert models["llm"]["backend"] == "openai"
    finally:
        serve.delete("openai")
    assert {body["model"] for body in asked} == {"Qwen/Qwen3-8B"}
    assert all(body["chat_template_kwargs"]["enable_thinking"] is False for body in asked)
