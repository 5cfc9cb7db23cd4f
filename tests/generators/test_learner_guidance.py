"""Guidance by a learner: the clean image is the scheduler's own, bits hold, and nothing else changes."""

import json

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from learners import guiding, publish
from PIL import Image
from samples import encoded
from test_store import plan_rows

from ray_synth.config import GenerationConfig, PracticeGuidanceConfig
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError
from ray_synth.generators.diffusion import DiffusionGenerator
from ray_synth.generators.learner import Steering, SteeringLearner, guided_by, steer
from ray_synth.generators.learner_guidance import (
    SCHEDULERS,
    LearnerGuidance,
    clean_weights,
    guided_steps,
)
from ray_synth.generators.registry import check_guidance
from ray_synth.storage.folder import Folder
from ray_synth.training.model_files import card_transform

VARIANCE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_CLIP = {"DDIMScheduler": {"clip_sample": False}, "DDPMScheduler": {"clip_sample": False}}
EMBEDDED = GenerationConfig(
    model="embedded", dtype="float32", batch_size=3, width=32, height=32, num_inference_steps=4,
    guidance_scale=1.0, device="cpu", num_threads=1,
)  # fmt: skip


def pixels(images):
    return [np.asarray(image) for image in images]


def latent_consistency(folder):
    """LCM's own pipeline, which shows what its scheduler calls denoised."""
    pipelines.lcm(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "LatentConsistencyModelPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


GUIDED = {
    name: pipelines.FAMILIES[name] for name in ("sd15", "lcm", "sdxl", "sd3", "pixart-sigma")
} | {"lcm-own": latent_consistency}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def steering(run):
    return guiding(run)


@pytest.fixture(scope="module")
def learner(steering):
    return SteeringLearner(steering, "cpu")


def scheduler_of(name, prediction):
    kind = getattr(diffusers, name)
    if name == "FlowMatchEulerDiscreteScheduler":
        return kind(stochastic_sampling=True)
    return kind(**VARIANCE, prediction_type=prediction, **NO_CLIP.get(name, {}))


def own_clean(scheduler, step, sample, output, timestep):
    """What the scheduler itself takes the clean latents to be."""
    name = type(scheduler).__name__
    if hasattr(scheduler, "convert_model_output"):  # the multistep solvers, once they know the step
        return scheduler.convert_model_output(output, sample=sample)
    if name == "PNDMScheduler":  # it keeps none: a step to no noise at all is the clean latents
        scheduler.final_alpha_cumprod = torch.tensor(1.0)
        scheduler.alphas_cumprod[0] = 1.0
        return scheduler._get_prev_sample(sample, timestep, 0, output)
    if name == "FlowMatchEulerDiscreteScheduler":  # its last step is a step to no noise
        return sample + (0 - scheduler.sigmas[scheduler.step_index - 1]) * output
    if name == "LCMScheduler":
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        return (step.denoised - skip * sample) / out
    return step.pred_original_sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_clean_latents_are_those_of_the_scheduler_itself(name, prediction):
    scheduler = scheduler_of(name, prediction)
    scheduler.set_timesteps(8)
    rng = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 4, 4, generator=rng) * getattr(scheduler, "init_noise_sigma", 1)
    for at, timestep in enumerate(scheduler.timesteps[:6]):
        output = torch.randn(2, 4, 4, 4, generator=rng)
        of_sample, of_output = clean_weights(scheduler, at, timestep)
        mine = of_sample * sample + of_output * output
        solver = hasattr(scheduler, "convert_model_output")
        if solver:
            scheduler._init_step_index(timestep) if scheduler.step_index is None else None
            theirs = own_clean(scheduler, None, sample, output, timestep)
        step = scheduler.step(output, timestep, sample)
        if not solver:
            theirs = own_clean(scheduler, step, sample, output, timestep)
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)
        sample = step.prev_sample


def test_solvers_on_flow_matching_are_known_as_well():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    scheduler.set_timesteps(6)
    scheduler._init_step_index(scheduler.timesteps[0])
    sample, output = torch.randn(2, 1, 4, 4, 4).unbind()
    of_sample, of_output = clean_weights(scheduler, 0, scheduler.timesteps[0])
    own = scheduler.convert_model_output(output, sample=sample)
    torch.testing.assert_close(of_sample * sample + of_output * output, own)


def test_guided_steps_are_spread_and_leave_the_last_one_alone():
    assert guided_steps(1, 0.5) == {0}
    assert guided_steps(4, 0.5) == {0, 2}
    assert guided_steps(4, 1.0) == {0, 1, 2}
    for steps in range(2, 60):
        for share in (0.01, 0.2, 0.5, 1.0):
            found = guided_steps(steps, share)
            assert len(found) == min(steps - 1, max(1, round(share * steps)))
            assert min(found) >= 0
            assert max(found) < steps - 1


@pytest.mark.parametrize("family", GUIDED)
def test_each_family_is_guided_with_the_same_bits_in_any_batch(tmp_path, family, steering, learner):
    """And an unguided image afterwards is the one of before, in the same generator."""
    steps = 3 if family.startswith("lcm") else 4
    side = 256 if family.startswith("pixart") else 64
    config = pipelines.config_of(
        GUIDED[family](tmp_path / family), num_inference_steps=steps, width=side, height=side
    )
    check_guidance(config)
    generator = DiffusionGenerator(config)
    kept = {key: value.clone() for key, value in generator.pipeline.vae.state_dict().items()}
    rows = plan_rows(3)
    before = pixels(generator.generate(rows))
    steer(generator, steering, "cpu")
    together = pixels(generator.generate(rows))
    assert all((a != b).any() for a, b in zip(before, together, strict=True))
    for at, row in enumerate(rows):
        assert (pixels(generator.generate([row]))[0] == together[at]).all()
    generator.guide(None, None)
    assert all(
        (a == b).all() for a, b in zip(before, pixels(generator.generate(rows)), strict=True)
    )
    assert all(weights.requires_grad for weights in generator.pipeline.vae.parameters())
    assert "step" not in vars(generator.pipeline.scheduler)
    for key, value in generator.pipeline.vae.state_dict().items():
        assert (value == kept[key]).all()


def test_the_shift_makes_the_picture_harder_and_has_the_size_that_is_asked(steering, learner):
    generator = DiffusionGenerator(EMBEDDED)
    guidance = LearnerGuidance(generator.pipeline, learner, PracticeGuidanceConfig(scale=0.02))
    clean = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.7
    shift = guidance.shift(clean)
    with torch.no_grad():
        before = learner.entropy(guidance.decoded(clean))
        after = learner.entropy(guidance.decoded(clean + shift))
    assert (after > before).all()
    size = shift.square().mean(dim=(1, 2, 3)).sqrt() / clean.square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(size, 0.02 * (1 - before), rtol=1e-3, atol=1e-6)


def test_a_gradient_that_is_no_number_guides_nothing(learner):
    generator = DiffusionGenerator(EMBEDDED)
    guidance = LearnerGuidance(generator.pipeline, learner, PracticeGuidanceConfig())
    clean = torch.randn(2, 4, 8, 8)
    clean[1] = float("nan")
    shift = guidance.shift(clean)
    assert (shift[0] != 0).any()
    assert (shift[1] == 0).all()


def test_large_pictures_are_decoded_at_about_the_learners_size(learner):
    generator = DiffusionGenerator(EMBEDDED)
    guidance = LearnerGuidance(generator.pipeline, learner, PracticeGuidanceConfig())
    assert guidance.decoded(torch.zeros(1, 4, 16, 16)).shape[-2:] == (64, 64)
    assert guidance.decoded(torch.zeros(1, 4, 64, 96)).shape[-2:] == (64, 96)


def test_images_guided_by_reference_are_guided_by_a_learner_too(steering):
    config = EMBEDDED.model_validate({**EMBEDDED.model_dump(), "reference": {"strength": 0.6}})
    rows = [{**row, "reference_image": encoded(at)} for at, row in enumerate(plan_rows(2))]
    generator = DiffusionGenerator(config)
    before = pixels(generator.generate(rows))
    steer(generator, steering, "cpu")
    after = pixels(generator.generate(rows))
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
    assert (pixels(generator.generate(rows[1:]))[0] == after[1]).all()


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("flux", {}, "images of a FluxPipeline with AutoencoderKL cannot be guided"),
        ("sd15", {"scheduler": "HeunDiscreteScheduler"}, "a HeunDiscreteScheduler predicts"),
        ("sd15", {"scheduler": "DDIMScheduler"}, "a DDIMScheduler with clip_sample"),
        ("sd15", {"offload": True}, "as a whole on one device"),
    ],
)
def test_what_cannot_be_guided_is_refused_by_its_small_files(tmp_path, family, changes, says):
    folder = pipelines.FAMILIES[family](tmp_path / family)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match=says):
        check_guidance(pipelines.config_of(folder, **changes))


def test_a_plug_in_is_not_guided():
    with pytest.raises(UserError, match="select works with any generator"):
        check_guidance(GenerationConfig(generator="painting:Painter"))


@pytest.mark.parametrize("crop", [1.0, 0.875])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_learner_sees_an_image_as_a_test_does(tmp_path, crop, mode):
    run = Folder(tmp_path)
    steering = Steering(run, publish(run, size=32, crop_pct=crop, interpolation=mode, sure=1.0))
    learner = SteeringLearner(steering, "cpu")
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    ).resize((90, 60), Image.Resampling.BILINEAR)
    transform = card_transform(steering.card)
    with torch.no_grad():
        seen = transform.batch(transform.prepare(picture)[None])
        whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
        mine = (learner._seen(whole) - 0.5) / 0.5
    assert (mine - seen).abs().mean() < 0.01
    assert (mine - seen).abs().max() < 0.05


def test_an_entropy_does_not_depend_on_the_other_pictures(learner):
    pictures = [decode_image(encoded(number)) for number in range(5)]
    found = learner.entropies([*pictures, None])
    assert found[-1] is None
    assert all(0 <= value <= 1 for value in found[:-1])
    assert learner.entropies(pictures[::-1]) == found[:-1][::-1]
    assert [learner.entropies([picture])[0] for picture in pictures] == found[:-1]


def test_the_fingerprint_says_which_learner_guides_and_how(run, steering):
    assert Steering(run, steering.learner).fingerprint("abc") == "abc"
    found = {steering.fingerprint("abc"), steering.fingerprint("abd"), "abc"}
    found.add(guiding(run, scale=0.2).fingerprint("abc"))
    found.add(guiding(run, 7).fingerprint("abc"))
    assert len(found) == 5
    assert guiding(run).fingerprint("abc") == steering.fingerprint("abc")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learner": "../../etc"}, "no guidance of a run"),
        ({"learner": "practice/learner-000/../.."}, "no guidance of a run"),
        ({"arm": "../mixed"}, "no guidance of a run"),
        ({"bn": None}, "no guidance of a run"),
        ({"guidance": {"scale": 1e9}}, "no guidance of a run"),
        ({"guidance": "all"}, "no guidance of a run"),
        ({"learner": "practice/learner-555"}, "no learner in"),
        ({"version": "0"}, "other weights"),
    ],
)
def test_a_row_that_names_no_learner_of_its_run_is_refused(run, steering, change, says):
    facts = {"steering": steering.facts()}
    assert guided_by(run, facts, "0") == steering
    assert guided_by(run, {}, "0") is None
    with pytest.raises(UserError, match=says):
        guided_by(run, {"steering": {**facts["steering"], **change}}, "0")


def test_a_stale_learner_is_named(run, steering, caplog):
    other = Folder(run.uri + "-2")
    old = guiding(other, 1)
    assert old.newest() == old.learner
    publish(other, 2)
    publish(other, 3)
    steer(DiffusionGenerator(EMBEDDED), old, "cpu")
    assert "steered by practice/learner-001, and practice/learner-003 is newer" in caplog.text
