"""Steps, guidance and size that a config leaves open are the model family's, and a run keeps numbers."""

import logging

from samples import ROOT

from ray_synth.config import load_config, load_run_config
from ray_synth.pipeline.run import begin, check_run
from ray_synth.stages import changed

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
OPEN = ["width", "height", "num_inference_steps", "guidance_scale"]


def test_a_run_keeps_what_its_config_left_open_as_numbers(tmp_path, caplog):
    place = f"runs_dir={tmp_path}"
    steps = "generation.num_inference_steps=4"  # the family's; the quickstart takes one
    given = check_run(load_config(QUICKSTART, [place, steps]))
    with caplog.at_level(logging.INFO, "ray_synth"):
        run = check_run(
            load_config(QUICKSTART, [place, *(f"generation.{name}=null" for name in OPEN)])
        )
    assert "generator: Stable Diffusion with LCM" in caplog.text
    assert "4 steps, guidance 1, 64 x 64" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    generation = run.config.generation
    assert [getattr(generation, name) for name in OPEN] == [64, 64, 4, 1.0]
    for stage, inputs in given.records.inputs.items():
        assert changed(inputs, run.records.inputs[stage]) == [], "the numbers themselves: no change"
    begin(run)
    assert load_run_config(run.folder).generation.width == 64


def test_what_does_not_go_with_a_model_is_said_before_anything_is_spent(tmp_path, caplog):
    check_run(load_config(QUICKSTART, [f"runs_dir={tmp_path}", "generation.guidance_scale=7.5"]))
    (said,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert said.startswith("generation.guidance_scale 7.5: Stable Diffusion with LCM is distilled")
