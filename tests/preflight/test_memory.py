"""Memory and disk: what is certainly too small is refused, what may be is said, the rest is unknown."""

import json
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from samples import ROOT

from ray_synth.config import load_config
from ray_synth.preflight.demands import Sizes
from ray_synth.preflight.hub_models import hub_parameters, weight_files
from ray_synth.preflight.memory import GIB, disk_needs, look, memory_needs
from ray_synth.preflight.model_sizes import classifier_size, model_folder, stored_parameters
from ray_synth.preflight.packing import Nodes
from ray_synth.preflight.reach import Reach
from ray_synth.storage.folder import Folder

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


RESNET = ("training.model=resnet50", "training.model_kwargs={}", "training.num_gpus=1",
          "training.image_size=224")  # fmt: skip


def config_of(*overrides):
    return load_config(QUICKSTART, list(overrides))


def write_headers(path, *shapes):
    """A safetensors file of these shapes whose numbers are left out: headers are all that is read."""
    header = json.dumps(
        {
            f"w{i}": {"dtype": "F16", "shape": list(s), "data_offsets": [0, 0]}
            for i, s in enumerate(shapes)
        }
    ).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.fixture
def large_model(tmp_path):
    """The headers of a pipeline of 13 billion parameters, one part in two variants."""
    folder = tmp_path / "large"
    write_headers(folder / "unet" / "a-00001-of-00002.safetensors", (100_000, 60_000))
    write_headers(folder / "unet" / "a-00002-of-00002.safetensors", (100_000, 60_000))
    write_headers(folder / "text_encoder" / "model.safetensors", (100_000, 10_000))
    write_headers(folder / "text_encoder" / "model.fp16.safetensors", (100_000, 10_000))
    return folder


def gpus(kind, **facts):
    return Reach((Nodes(2, 16, 1, 64 * GIB, kind),), **facts)


def test_parameters_are_counted_from_headers_one_variant_of_a_part(large_model):
    assert stored_parameters(large_model) == 13_000_000_000
    embedded = stored_parameters(model_folder("embedded"))
    from safetensors import safe_open

    counted = 0
    for path in model_folder("embedded").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            counted += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert embedded == counted > 0


def test_a_language_model_is_held_against_all_gpus_that_it_is_spread_over(tmp_path):
    write_headers(tmp_path / "llm" / "model.safetensors", (100_000, 320_000))  # 59.6 GiB

    def problems(num_gpus, per_node):
        nodes = Reach((Nodes(2, 16, per_node, 128 * GIB, "L4"),))
        llm = f"meaning.llm={{model: {tmp_path / 'llm'}, num_gpus: {num_gpus}}}"
        return [line for line in look(config_of(llm), nodes).problems if "meaning.llm" in line]

    (problem, *_) = problems(1, 8)
    assert "at least 59.6 GiB of GPU memory, and 1 of an L4 has 24.0 GiB" in problem
    assert "or more meaning.llm.num_gpus" in problem
    assert problems(2, 8) and not problems(4, 8)


def test_weights_that_no_gpu_holds_are_refused(large_model):
    config = config_of(f"generation.model={large_model}", "generation.num_gpus=1")
    (problem, *_) = look(config, gpus("T4")).problems
    assert "generation needs at least 24.2 GiB of GPU memory, and 1 of a T4 has 16.0 GiB" in problem
    assert "generation.offload" in problem
    assert look(config, gpus("A100")).problems == []
    # Half of a GPU of 40 GiB is too little as well.
    half = config_of(f"generation.model={large_model}", "generation.num_gpus=0.5")
    assert "0.5 of an A100-40G has 20.0 GiB" in look(half, gpus("A100-40G")).problems[0]


def test_what_may_be_too_large_is_a_warning(large_model):
    config = config_of(
        f"generation.model={large_model}", "generation.num_gpus=1", "generation.width=1024",
        "generation.height=1024", "generation.batch_size=16",
    )  # fmt: skip
    found = look(config, gpus("A100-40G"))
    assert found.problems == []
    assert any("generation needs about" in warning for warning in found.warnings)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, and an empty cache: its repositories are folders of `tmp_path/hub`."""
    from huggingface_hub import constants

    root = tmp_path / "hub"

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/api/models/"):
                model = "/".join(self.path.split("/")[3:5])
                if not (root / model).is_dir():
                    return self.send_error(404)
                files = [p for p in (root / model).rglob("*") if p.is_file()]
                siblings = [{"rfilename": str(p.relative_to(root / model))} for p in files]
                body = json.dumps({"id": model, "sha": "abc", "siblings": siblings}).encode()
            elif "/resolve/abc/" not in self.path:
                return self.send_error(404)
            else:
                model, name = self.path.lstrip("/").split("/resolve/abc/")
                body = (root / model / name).read_bytes()[:100_001]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return None

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # as HF_ENDPOINT does, which is read once
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, endpoint=endpoint))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_parameters.cache_clear()
    yield root
    server.shutdown()
    server.server_close()
    hub_parameters.cache_clear()


def test_a_model_is_judged_alike_before_its_download_and_after(hub, tmp_path):
    """A model of 7 billion on 0.4 of an A10G passed at the first start and was refused at the second."""
    repository = hub / "nobody" / "seven"
    write_headers(repository / "model-1.safetensors", (70_000, 50_000))
    write_headers(repository / "model-2.safetensors", (70_000, 50_000))
    write_headers(repository / "original" / "consolidated.safetensors", (70_000, 100_000))
    (repository / "config.json").write_text("{}")
    config = config_of("meaning.llm={model: nobody/seven, num_gpus: 0.4}")
    before = look(config, gpus("A10G"))
    assert "meaning.llm needs at least 13.0 GiB of GPU memory" in before.problems[0]
    snapshot = tmp_path / "cache" / "models--nobody--seven"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("abc")
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
        target = snapshot / "snapshots" / "abc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((repository / name).read_bytes())
    assert model_folder("nobody/seven") is not None
    after = look(config, gpus("A10G"))
    assert (after.problems, after.warnings) == (before.problems, before.warnings)
    assert (
        look(config_of("meaning.llm={model: nobody/seven, num_gpus: 0.8}"), gpus("A10G")).problems
        == []
    )


def test_of_a_pipeline_on_the_hub_its_parts_are_counted():
    names = [
        "model_index.json", "unet/a.safetensors", "unet/a.fp16.safetensors", "vae/v.safetensors",
        "text_encoder/t.fp16.safetensors", "safety_checker/s.safetensors", "v1-5-pruned.safetensors",
        "unet/deep/x.safetensors",
    ]  # fmt: skip
    assert weight_files(names) == [
        "text_encoder/t.fp16.safetensors", "unet/a.safetensors", "vae/v.safetensors",
    ]  # fmt: skip
    assert weight_files(["config.json", "model.safetensors", "onnx/m.safetensors"]) == [
        "model.safetensors"
    ]


def test_what_the_hub_does_not_tell_is_said(hub, monkeypatch):
    from huggingface_hub import constants

    config = config_of("meaning.llm={model: nobody/gone, num_gpus: 0.4}")
    (warning,) = set(look(config, gpus("A10G")).warnings)
    assert warning.startswith("meaning.llm.model nobody/gone: its size is not known (")
    assert "once it is here, a start that does not fit is refused" in warning
    hub_parameters.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "(HF_HUB_OFFLINE is set)" in look(config, gpus("A10G")).warnings[0]


def test_what_is_not_at_hand_is_unknown_and_not_refused(hub):
    config = config_of(
        "generation.model=nobody/has-this", "generation.num_gpus=1",
        "meaning.llm={model: nobody/has-that, num_gpus: 1}",
    )  # fmt: skip
    assert model_folder("nobody/has-this") is None
    found = look(config, gpus("T4"))
    assert found.problems == []
    unknown_gpu = look(config_of("generation.num_gpus=1"), gpus("SOMETHING"))
    assert unknown_gpu.problems == unknown_gpu.warnings == []


def test_training_needs_follow_the_model_and_the_batch():
    parameters, outputs = classifier_size("resnet50", ("{}", 224), 1000)
    assert parameters == 25_557_032
    assert (
        20e6 < outputs < 40e6
    )  # 66 MB per image in half precision; 22 GB for 256 were seen elsewhere
    small, large = (
        next(n for n in memory_needs(config_of(*RESNET, size)) if n.what == "training")
        for size in ("training.batch_size=64", "training.batch_size=256")
    )
    assert large.sure == small.sure == 16 * parameters  # weights, gradients, two states of adamw
    assert large.likely - large.sure == 4 * (small.likely - small.sure)
    config = config_of(*RESNET, "training.batch_size=512", "training.dtype=float32")
    assert any("lower training.batch_size" in text for text in look(config, gpus("L4")).warnings)


def test_a_disk_that_is_certainly_too_small_is_refused(tmp_path, monkeypatch):
    config = config_of(
        "generation.width=1024", "generation.height=1024", "prompting.multiplier=1000",
        f"runs_dir={tmp_path}",
    )  # fmt: skip
    sizes = Sizes(real=1000, classes=10)
    images, rest = disk_needs(config, sizes)
    assert images > 1e12  # a million of 1.6 MB
    reach = Reach((Nodes(1, 8, 0, 64 * GIB),))
    free = 100 * GIB
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(total=1, free=free))
    found = look(config, reach, sizes, runs=Folder(str(tmp_path)))
    assert "free some, give another runs_dir" in found.problems[0]
    free = images // 2
    found = look(config, reach, sizes, runs=Folder(str(tmp_path)))
    assert found.problems == []
    assert "of disk" in found.warnings[0]
    free = images + rest
    assert look(config, reach, sizes, runs=Folder(str(tmp_path))).warnings == []


def test_more_in_flight_than_the_object_store_holds_is_a_warning():
    config = config_of(
        "generation.width=1024", "generation.height=1024", "generation.batch_size=64",
        "generation.pool={min_size: 1, max_size: 48}",
    )  # fmt: skip
    nodes = (Nodes(1, 8, 0, 64 * GIB),)
    says = "of the object store, which has 2.0 GiB"
    few, many = (Reach(nodes, object_store=size * GIB) for size in (2, 30))
    assert any(says in warning for warning in look(config, few).warnings)
    assert not any("object store" in warning for warning in look(config, many).warnings)


def test_the_quickstart_is_modest():
    reach = Reach((Nodes(1, 4, 0, 8 * GIB),))
    found = look(config_of(), reach, Sizes(real=50, classes=10))
    assert found.problems == found.warnings == []
    tiny = look(config_of(), Reach((Nodes(1, 4, 0, 1 * GIB),)), Sizes(real=50, classes=10))
    assert tiny.problems == []
    assert any("of memory, all nodes have 1.0 GiB" in warning for warning in tiny.warnings)
