"""IP-Adapters: real images guide by what CLIP sees in them, alike in any batch; others are refused."""

import json
from functools import partial

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from adapters import save_ip_adapter, save_lora
from pipelines import FAMILIES
from safetensors.torch import load_file, save_file
from test_store import plan_rows

from ray_synth.config import GenerationConfig
from ray_synth.data.images import encode_array
from ray_synth.embedded import sd_folder
from ray_synth.errors import UserError
from ray_synth.generation.batch_size import measure
from ray_synth.generators.adapter_files import adapter_repos
from ray_synth.generators.diffusion import DiffusionGenerator
from ray_synth.generators.registry import check_generator, fingerprint

config_of = partial(pipelines.config_of, reference={})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("ip-adapters")


@pytest.fixture(scope="module")
def made(root):
    """Folder of a family, and of an IP-Adapter for it; made once."""
    kept = {}

    def get(name, **kind):
        key = name, *kind
        if key not in kept:
            folder = FAMILIES[name](root / name)
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
            adapter = save_ip_adapter(pipeline, root / f"{'-'.join(key)}-ip", **kind)
            kept[key] = folder, adapter
        return kept[key]

    return get


def worn(path, **more):
    return {"path": str(path), "kind": "ip_adapter", **more}


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return encode_array(np.kron(pixels, np.ones((10, 10, 1), np.uint8)))


def rows_of(*guides):
    return [
        {
            **row,
            "prompt": "a photo of a crane",
            "negative_prompt": "",
            "reference_image": picture(at),
        }
        for row, at in zip(plan_rows(len(guides)), guides, strict=True)
    ]


def pixels(generator, rows):
    return [np.asarray(image).astype(int) for image in generator.generate(rows)]


@pytest.mark.parametrize(
    ("name", "kind", "guidance"),
    [
        ("sd15", {}, 1.0),
        ("sd15", {}, 5.0),
        ("sd15", {"patches": True}, 5.0),
        pytest.param("sdxl", {}, 5.0, marks=pytest.mark.slow),
        pytest.param("sd15-safety", {}, 5.0, marks=pytest.mark.slow),
    ],
)
def test_each_image_is_guided_by_its_own_real_image_alike_in_any_batch(made, name, kind, guidance):
    folder, adapter = made(name, **kind)
    config = config_of(folder, adapters=[worn(adapter)], guidance_scale=guidance)
    check_generator(config)
    generator = DiffusionGenerator(config)
    rows = rows_of(0, 1, 2)
    together = pixels(generator, rows)
    for row, image in zip(rows, together, strict=True):
        np.testing.assert_array_equal(pixels(generator, [row])[0], image)
        np.testing.assert_array_equal(pixels(DiffusionGenerator(config), [row])[0], image)
    other = [{**row, "reference_image": picture(9)} for row in rows]
    assert all((a != b).any() for a, b in zip(together, pixels(generator, other), strict=True))


def test_it_is_what_diffusers_own_call_makes_of_the_image(made):
    folder, adapter = made("sd15")
    config = config_of(folder, adapters=[worn(adapter, weight=0.6)], guidance_scale=5.0)
    generator = DiffusionGenerator(config)
    rows = rows_of(3)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_ip_adapter(
        str(adapter), subfolder="", weight_name="ip-adapter.safetensors",
        image_encoder_folder="image_encoder",
    )  # fmt: skip
    pipeline.set_ip_adapter_scale(0.6)
    from ray_synth.data.images import decode_image

    theirs = pipeline(
        rows[0]["prompt"], negative_prompt="", width=64, height=64, num_inference_steps=2,
        guidance_scale=5.0, ip_adapter_image=decode_image(rows[0]["reference_image"]),
        generator=torch.Generator().manual_seed(rows[0]["seed"]),
    ).images[0]  # fmt: skip
    ours = pixels(generator, rows)[0]
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1, "batches of 2 round otherwise"
    weak = DiffusionGenerator(
        config.model_copy(
            update={"adapters": [config.adapters[0].model_copy(update={"weight": 1.0})]}
        )
    )
    assert (pixels(weak, rows)[0] != ours).any(), "its weight counts"


def test_a_lora_goes_with_it_and_both_are_told(made, root):
    folder, adapter = made("sd15")
    lora = save_lora(diffusers.DiffusionPipeline.from_pretrained(folder), root / "beside")
    config = config_of(folder, adapters=[{"path": str(lora)}, worn(adapter)])
    check_generator(config)
    generator, alone = (
        DiffusionGenerator(c)
        for c in (config, config.model_copy(update={"adapters": config.adapters[1:]}))
    )
    rows = rows_of(0)
    assert (pixels(generator, rows)[0] != pixels(alone, rows)[0]).any()
    told = json.loads(json.dumps(generator.provenance))
    assert [sorted(item) for item in told["adapters"]] == [
        ["path", "sha256", "weight"], ["image_encoder", "path", "sha256", "weight"],
    ]  # fmt: skip
    assert told["strength"] is None and told["pipeline"] == "StableDiffusionPipeline"


def test_the_embedded_model_takes_one_and_its_digest_is_of_all_that_decides(root):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(sd_folder())
    adapter = save_ip_adapter(pipeline, root / "embedded")
    config = GenerationConfig(
        model="embedded", adapters=[worn(adapter)], reference={}, device="cpu", num_threads=1,
        batch_size=2, dtype="float32", num_inference_steps=1,
    )  # fmt: skip
    check_generator(config)
    (one, two) = pixels(DiffusionGenerator(config), rows_of(0, 1))
    assert (one != two).any()
    marks = {fingerprint(config)}
    strong = config.model_copy(
        update={"reference": config.reference.model_copy(update={"strength": 0.1})}
    )
    assert fingerprint(strong) in marks, "the strength is image-to-image's"
    for change in ("weight", "file", "encoder"):
        if change == "weight":
            adapters = [config.adapters[0].model_copy(update={"weight": 0.5})]
            marks.add(fingerprint(config.model_copy(update={"adapters": adapters})))
            continue
        save_ip_adapter(pipeline, root / change, seed=1)
        changed = root / "embedded" / "ip-adapter.safetensors"
        source = root / change / "ip-adapter.safetensors"
        if change == "encoder":
            changed = root / "embedded" / "image_encoder" / "model.safetensors"
            source = root / change / "image_encoder" / "model.safetensors"
        changed.write_bytes(source.read_bytes())
        marks.add(fingerprint(config))
    assert len(marks) == 4


@pytest.mark.slow
def test_compiled_and_probed_it_is_as_it_is_without(made):
    folder, adapter = made("sd15")
    config = config_of(folder, adapters=[worn(adapter)])
    rows = rows_of(0, 1)
    eager = pixels(DiffusionGenerator(config), rows)
    generator = DiffusionGenerator(config.model_copy(update={"compile": True}))
    assert generator.compiled
    compiled = pixels(generator, rows)
    np.testing.assert_array_equal(pixels(generator, rows[1:])[0], compiled[1])
    assert np.abs(compiled[0] - eager[0]).mean() < 3
    assert measure(config)["at_once"] == 4


def test_on_the_hub_it_is_three_files_of_one_commit():
    given = {"path": "owner/name", "weight_name": "sdxl_models/ip-adapter_sdxl.safetensors"}
    repos = adapter_repos(GenerationConfig(adapters=[worn(**given)], reference={}).adapters)
    assert [repo.file for repo in repos] == [
        "sdxl_models/ip-adapter_sdxl.safetensors",
        "sdxl_models/image_encoder/config.json", "sdxl_models/image_encoder/model.safetensors",
    ]  # fmt: skip
    assert {repo.setting for repo in repos} == {"generation.adapters.0"}
    other = worn(**given, image_encoder="models/image_encoder")
    repos = adapter_repos(GenerationConfig(adapters=[other], reference={}).adapters)
    assert repos[2].file == "models/image_encoder/model.safetensors"


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("sd3", "no IP-Adapter goes into StableDiffusion3Pipeline here; take a Stable Diffusion 1"),
        ("of-sdxl", "does not fit .*: it has .* layers of .*; it was made for another model"),
        ("encoder", "image_encoder, the image encoder of .*, has no model.safetensors"),
        (
            "other-encoder",
            "reads images as 24 numbers, and the image encoder .* has projection_dim 16",
        ),
        ("face", "holds no IP-Adapter that is read here: of those for faces"),
        ("cut", "is not a complete safetensors file"),
        ("uri", "has an image encoder beside it: give a folder of this machine, or a hub id"),
    ],
)
def test_what_is_wrong_is_said_before_the_weights_are_read(made, tmp_path, case, says):
    folder, _ = made("sd15")
    place = tmp_path / "ip"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    save_ip_adapter(pipeline, place)
    file, encoder = place / "ip-adapter.safetensors", place / "image_encoder"
    if case == "sd3":
        folder = made_folder(tmp_path)
    elif case == "of-sdxl":
        place = made("sdxl")[1]
    elif case == "encoder":
        (encoder / "model.safetensors").unlink()
    elif case == "other-encoder":
        text = json.loads((encoder / "config.json").read_text())
        (encoder / "config.json").write_text(json.dumps({**text, "projection_dim": 16}))
    elif case == "face":
        save_file({**load_file(file), "ip_adapter.0.to_q_lora.down.weight": torch.ones(1)}, file)
    elif case == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif case == "uri":
        place = f"file://{place}"
    with pytest.raises(UserError, match=f"generation.adapters: .*{says}"):
        check_generator(config_of(folder, adapters=[worn(place)]))


def made_folder(folder):
    return FAMILIES["sd3"](folder / "sd3")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"adapters": [worn("a/b")]}, "guides by real images: set generation.reference"),
        ({"adapters": [worn("a/b"), worn("a/c")], "reference": {}}, "has 2 IP-Adapters"),
        ({"adapters": [{"path": "a/b", "image_encoder": "x"}]}, "image_encoder belongs to kind"),
        ({"adapters": [worn("a/b", token="<x>")], "reference": {}}, "token belongs to kind"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        GenerationConfig.model_validate(settings)
