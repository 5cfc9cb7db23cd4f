"""A generator on several GPUs: a part that fits none of them is said before the model is loaded."""

import pytest
from samples import ROOT
from test_memory import large_model, write_headers  # noqa: F401

from ray_synth.config import load_config
from ray_synth.errors import UserError
from ray_synth.generators.loading import check_placement
from ray_synth.preflight.memory import GIB, look
from ray_synth.preflight.model_sizes import parts_parameters
from ray_synth.preflight.packing import Nodes
from ray_synth.preflight.reach import Reach
from ray_synth.preflight.spread import place, spread_problem

FLUX = {
    "transformer": 23 * GIB,
    "text_encoder_2": 9 * GIB,
    "text_encoder": GIB // 4,
    "vae": GIB // 6,
}


def test_parts_go_to_gpus_in_turn_and_one_that_is_too_large_to_the_cpu():
    assert place(FLUX, 2, 24 * GIB) == []
    assert place(FLUX, 4, 22 * GIB) == ["transformer"], "more GPUs of the same size are no help"
    problem = spread_problem(FLUX, 4, 22 * GIB, "A10G")
    assert "transformer of the model takes 23.0 GiB, more than one A10G has (22 GiB)" in problem
    assert "it would run on the CPU" in problem
    assert spread_problem(FLUX, 2, 24 * GIB, "A10G") == ""


def test_a_part_may_be_left_over_though_a_gpu_would_hold_it_alone():
    parts = {"transformer": 20 * GIB, "text_encoder": 20 * GIB, "vae": 5 * GIB, "image": 5 * GIB}
    assert place(parts, 2, 24 * GIB) == ["vae", "image"]
    assert "has no A10G with room for it (24 GiB)" in spread_problem(parts, 2, 24 * GIB, "A10G")


def test_the_preflight_refuses_it(large_model):  # noqa: F811
    assert parts_parameters(large_model) == {"unet": 12_000_000_000, "text_encoder": 10**9}
    config = load_config(
        ROOT / "jobs" / "configs" / "quickstart.yaml",
        [f"generation.model={large_model}", "generation.num_gpus=4", "generation.width=512",
         "generation.height=512", "generation.dtype=float32"],
    )  # fmt: skip
    for kind, fits in (("A10G", False), ("L4", False), ("A100-80G", True), ("", True)):
        reach = Reach((Nodes(2, 64, 4, 256 * GIB, kind),))
        said = [p for p in look(config, reach).problems if "the unet of the model" in p]
        assert bool(said) is not fits, kind
    one = config.model_copy(
        update={"generation": config.generation.model_copy(update={"num_gpus": 1})}
    )
    reach = Reach((Nodes(2, 64, 4, 256 * GIB, "A10G"),))
    assert not [p for p in look(one, reach).problems if "splits no part" in p]


def test_a_pipeline_with_a_part_on_the_cpu_is_not_run():
    check_placement({"unet": 0, "vae": 1}, "a/b")
    check_placement({}, "a/b")
    with pytest.raises(UserError, match="transformer of 'a/b' fits none of the GPUs"):
        check_placement({"transformer": "cpu", "vae": 0}, "a/b")
