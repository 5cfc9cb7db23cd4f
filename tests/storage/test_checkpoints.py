"""What a checkpoint's config files ask for: code, keyword arguments and places that are not listed."""

import json
import shutil
from pathlib import Path

import pytest

from ray_synth.embedded import clip_folder
from ray_synth.errors import UserError
from ray_synth.storage.checkpoints import (
    allowed_generation,
    check_kernels,
    check_open_clip,
    check_pipeline,
    check_timm,
    check_transformers,
    no_code,
)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def write_code(folder: Path, marker: Path) -> None:
    """A module that leaves a trace where it is imported, under each name that configs here give."""
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(
            f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
            "from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast\n"
            "class Evil(PreTrainedTokenizerFast): pass\n"
            "def generate(model, **kw): return None\n"
        )


def set_in(path: Path, *keys: str, to: object) -> None:
    config = json.loads(path.read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = to
    path.write_text(json.dumps(config))


@pytest.fixture
def clip_copy(tmp_path: Path, marker: Path) -> Path:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder(), folder)
    for path in folder.rglob("*"):
        path.chmod(0o644 if path.is_file() else 0o755)
    write_code(folder, marker)
    return folder


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("text_cfg", "tokenizer_kwargs"), {"trust_remote_code": True}, "kwargs.trust_remote_code"),
        (("text_cfg", "tokenizer_kwargs"), {"clean": ["x"]}, "not of the type"),
        (("text_cfg", "tokenizer_kwargs"), [1], None),
        (("text_cfg", "act_kwargs"), {"forward": "x"}, "act_kwargs.forward"),
        (("text_cfg", "more_kwargs"), {"a": 1}, "text_cfg.more_kwargs"),
        (("vision_cfg", "timm_model_name"), "hf-hub:evil/model", "no model of timm's"),
        (("vision_cfg", "timm_model_name"), "local-dir:/tmp", "no model of timm's"),
        (("text_cfg", "hf_model_name"), "../evil", "not the id of a hub"),
        (("text_cfg", "hf_model_name"), "/tmp/evil", "not the id of a hub"),
        (("cache_dir",), "/tmp", "model_cfg.cache_dir"),
    ],
)
def test_a_clip_folder_decides_what_is_listed_and_nothing_else(clip_copy, keys, value, says):
    from ray_synth.meaning.clip import ClipModel

    check_open_clip(clip_copy)
    set_in(clip_copy / "open_clip_config.json", "model_cfg", *keys, to=value)
    with pytest.raises(UserError, match=says):
        ClipModel(f"local-dir:{clip_copy}")


def test_the_code_of_a_clip_folders_tokenizer_is_not_run(clip_copy, marker, monkeypatch):
    """Nor is anyone asked on the terminal whether to run it."""
    from ray_synth.meaning.clip import ClipModel

    monkeypatch.setattr("builtins.input", lambda _: "yes")
    set_in(
        clip_copy / "open_clip_config.json", "model_cfg", "text_cfg", "hf_tokenizer_name", to="x"
    )
    (clip_copy / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"})
    )
    (clip_copy / "config.json").write_text(
        json.dumps({"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"})
    )
    with pytest.raises(UserError, match="cannot load the CLIP model"):
        ClipModel(f"local-dir:{clip_copy}")
    assert not marker.exists()


def test_what_open_clips_own_models_hand_on_is_listed(tmp_path):
    import open_clip

    for name in open_clip.list_models():
        text = json.dumps({"model_cfg": open_clip.get_model_config(name)})
        (tmp_path / "open_clip_config.json").write_text(text)
        check_open_clip(tmp_path)


@pytest.fixture
def llm_folder(tmp_path: Path, marker: Path) -> Path:
    """A language model of two layers and a hundred words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path / "llm"
    torch.manual_seed(0)
    words = {"<eos>": 0, **{f"w{i}": i for i in range(1, 100)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="<eos>"
    ).save_pretrained(folder)
    config = GPT2Config(
        vocab_size=100, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_the_code_of_a_language_model_is_not_run(llm_folder, marker, monkeypatch):
    from ray_synth.meaning.transformers_llm import TransformersLLM

    monkeypatch.setattr("builtins.input", lambda _: "yes")
    TransformersLLM(str(llm_folder), device="cpu")
    write_code(llm_folder, marker)
    TransformersLLM(str(llm_folder), device="cpu")  # answers without its custom_generate/
    shutil.rmtree(llm_folder / "custom_generate")
    kept = (llm_folder / "config.json").read_text()
    for key, named in (("AutoModelForCausalLM", "evil.Evil"), ("AutoConfig", "evil.Evil")):
        set_in(llm_folder / "config.json", "auto_map", key, to=named)
        set_in(llm_folder / "config.json", "model_type", to="evil")
        with pytest.raises(UserError, match="cannot load the LLM"):
            TransformersLLM(str(llm_folder), device="cpu")
    (llm_folder / "config.json").write_text(kept)
    set_in(
        llm_folder / "tokenizer_config.json", "auto_map", "AutoTokenizer", to=[None, "evil.Evil"]
    )
    set_in(llm_folder / "tokenizer_config.json", "tokenizer_class", to="Evil")
    set_in(llm_folder / "config.json", "model_type", to="evil")
    with pytest.raises(UserError, match="cannot load the LLM"):
        TransformersLLM(str(llm_folder), device="cpu")
    assert not marker.exists()


def test_kernels_of_a_hub_are_code(llm_folder):
    set_in(llm_folder / "config.json", "attn_implementation", to="evil/kernels")
    with pytest.raises(UserError, match="attn_implementation 'evil/kernels'"):
        check_transformers(str(llm_folder))
    with pytest.raises(UserError, match="use_kernels"):
        check_kernels({"text_config": [{"use_kernels": True}]}, "x")
    check_kernels({"attn_implementation": {"": "sdpa"}, "_attn_implementation": None}, "x")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch x') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox_and_is_tried_when_it_is_loaded(llm_folder, template):
    from ray_synth.meaning.transformers_llm import TransformersLLM

    (llm_folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="chat template"):
        TransformersLLM(str(llm_folder), device="cpu")


def test_of_a_generation_config_the_listed_keys_are_taken(llm_folder):
    from ray_synth.meaning.transformers_llm import TransformersLLM

    (llm_folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 5], "num_beams": 50, "prompt_lookup_num_tokens": 3})
    )
    config = TransformersLLM(str(llm_folder), device="cpu")._model.generation_config
    assert config.eos_token_id == [0, 5]
    assert config.num_beams in (None, 1) and config.prompt_lookup_num_tokens is None
    assert allowed_generation(config).to_diff_dict()["eos_token_id"] == [0, 5]


@pytest.mark.parametrize("library", ["os", "evil", "ray_synth.cli.command", "diffusers.utils", ""])
def test_a_pipelines_parts_come_from_the_listed_libraries(tmp_path, library):
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "image_encoder": [None, None],
        "force_zeros": [1, 2],
    }
    check_pipeline(index, tmp_path, "m")
    with pytest.raises(UserError, match=f"unet/{library}.*trust_remote_code: true"):
        check_pipeline({**index, "unet": [library, "X"]}, tmp_path, "m")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusers.py").touch()
    with pytest.raises(UserError, match="unet/diffusers"):
        check_pipeline(index, tmp_path, "m")


def test_a_timm_folder_decides_what_is_listed(tmp_path):
    import timm

    from ray_synth.training.recipe import build_model

    model = timm.create_model("resnet18", num_classes=3)
    timm.models.save_for_hf(model, tmp_path, model_args={"drop_rate": 0.1})
    build_model(f"local-dir:{tmp_path}", num_classes=2)
    for part, key in (("model_args", "checkpoint_path"), ("pretrained_cfg", "state_dict")):
        text = (tmp_path / "config.json").read_text()
        set_in(tmp_path / "config.json", part, key, to="/etc/passwd")
        with pytest.raises(UserError, match=f"{part}.{key}"):
            check_timm(f"local-dir:{tmp_path}")
        with pytest.raises(UserError, match=f"{part}.{key}"):
            build_model(f"local-dir:{tmp_path}", num_classes=2)
        (tmp_path / "config.json").write_text(text)


def test_nobody_is_asked_whether_to_run_code():
    from transformers import dynamic_module_utils

    assert no_code() == {"trust_remote_code": False}
    assert dynamic_module_utils.TIME_OUT_REMOTE_CODE == 0
