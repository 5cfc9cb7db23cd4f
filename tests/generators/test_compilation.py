"""torch.compile at an actor's start: short, side by side, in less memory, and without where it fails."""

import threading
from functools import partial

import numpy as np
import pipelines
import pytest
import torch
from pipelines import sd15
from test_store import plan_rows

from ray_synth.errors import UserError
from ray_synth.generators.compilation import first_on_this_node
from ray_synth.generators.diffusion import DiffusionGenerator


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def nothing_compiled(monkeypatch):
    """What counts here is what is run to warm up: tracing a UNet takes seconds."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: None)
    monkeypatch.setattr(torch, "compile", lambda function, **more: function)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return sd15(tmp_path_factory.mktemp("sd") / "sd15")


config_of = partial(pipelines.config_of, num_inference_steps=40, batch_size=4)


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_the_first_of_a_node_compiles_alone_and_the_others_side_by_side():
    together = threading.Barrier(3)
    alone, done = [], []

    def work():
        if not done:
            alone.append(threading.get_ident())
            assert len(alone) == 1, "a second one began before the first had left its kernels"
            done.append("kernels")
        else:
            together.wait(timeout=20)  # which one after the other would never pass

    threads = [threading.Thread(target=first_on_this_node, args=("key", work)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not together.broken
    assert len(alone) == 1
    assert not any(thread.is_alive() for thread in threads)


def test_a_first_one_that_fails_leaves_the_place_to_the_next():
    with pytest.raises(ZeroDivisionError):
        first_on_this_node("key", lambda: 1 / 0)
    ran = []
    first_on_this_node("key", lambda: ran.append("first"))
    first_on_this_node("key", lambda: ran.append("second"))
    assert ran == ["first", "second"]


@pytest.mark.parametrize("reference", [None, {"strength": 0.25}])
def test_warming_up_takes_two_steps_and_not_a_whole_inference(
    folder, nothing_compiled, monkeypatch, reference
):
    steps = []
    unet = type(DiffusionGenerator(config_of(folder)).pipeline.unet)
    forward = unet.forward
    monkeypatch.setattr(
        unet, "forward", lambda self, *a, **k: steps.append(1) or forward(self, *a, **k)
    )
    generator = DiffusionGenerator(config_of(folder, compile=True, reference=reference))
    assert len(steps) in (2, 3)  # PNDM takes its second one twice
    assert generator.compiled
    assert generator.provenance["compile"] is True
    assert generator.provenance["num_inference_steps"] == 40


@pytest.mark.parametrize("compile_", [False, True])
def test_too_large_a_batch_is_halved_compiled_or_not(
    folder, nothing_compiled, monkeypatch, compile_
):
    made = DiffusionGenerator._batch

    def small_memory(self, rows):
        if self.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB")
        return made(self, rows)

    monkeypatch.setattr(DiffusionGenerator, "_batch", small_memory)
    generator = DiffusionGenerator(
        config_of(folder, compile=compile_, batch_size=8, num_inference_steps=1)
    )
    assert len(generator.generate(plan_rows(5))) == 5
    assert (generator.batch_size, generator.compiled) == (2, compile_)


def broken(graph, inputs):
    raise RuntimeError("no C++ compiler")


def test_a_compilation_that_fails_is_done_without_unless_it_was_asked_for(
    folder, monkeypatch, caplog
):
    module, function = torch.nn.Module.compile, torch.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **more: module(self, backend=broken, **more)
    )
    monkeypatch.setattr(torch, "compile", partial(function, backend=broken))
    with pytest.raises(UserError, match=r"torch\.compile of .* failed .*compile: false"):
        DiffusionGenerator(config_of(folder, compile=True, num_inference_steps=2))
    generator = DiffusionGenerator(config_of(folder, compile="auto", num_inference_steps=2))
    before = pixels(generator.generate(plan_rows(3)))
    assert not generator.compiled, "auto is for GPUs"
    generator._compile()  # as on a GPU
    (said,) = [record.getMessage() for record in caplog.records if record.name == "ray_synth"]
    assert "failed (BackendCompilerFailed" in said
    assert "its images are made without" in said
    assert not generator.compiled
    assert generator.provenance["compile"] is False
    np.testing.assert_array_equal(pixels(generator.generate(plan_rows(3))), before)
