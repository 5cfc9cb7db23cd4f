"""What later stages refuse is refused before the first, or cannot be known: every refusal is listed."""

import ast
import importlib
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from samples import ROOT

from ray_synth.config import load_config
from ray_synth.pipeline.run import check_run
from ray_synth.preflight.refusals import check_clip, check_llm

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
# Rooms whose code stages after `data` run.
ROOMS = ("device", "meaning", "generators", "prompting", "generation", "service", "training",
         "evaluation", "storage", "pipeline.steps", "pipeline.results", "report")  # fmt: skip
# In them, what other verbs, studies and the HTTP service alone use.
OTHERS = ("generators.tuning", "generation.retrieval",
          "generation.regenerate", "generation.selection", "service.client", "service.deploy_config",
          "service.limits", "service.messages", "service.app", "evaluation.checkpoint",
          "evaluation.corruption", "evaluation.diversity", "evaluation.domain_shift",
          "evaluation.features", "report.status", "report.status_table", "storage.secrets",
          "storage.texts", "storage.typed_yaml", "service.gate", "meaning.names")  # fmt: skip
RECIPE = "ray_synth.training.trainer:check_recipe"
GENERATOR = "ray_synth.generators.registry:check_generator"
IMAGES = "ray_synth.preflight.refusals:check_images"
LLM = "ray_synth.preflight.refusals:check_llm"
CLIP = "ray_synth.preflight.refusals:check_clip"
EARLY = "ray_synth.preflight.refusals:refuse_early"
DATA = "ray_synth.data.dataset:load_index"
BUDGETS = "ray_synth.prompting.budgets:class_budgets"
PLAN = "ray_synth.prompting.plan_settings:prompt_limit"
PRACTICE = "ray_synth.pipeline.practice:check_practice"
ON_ITS_NODE = "why: only the node that it runs on can tell"
LOADED = "why: only loading the weights tells; names, lists and the index are looked at before"
SERVER = "why: only the server can tell, when it is asked"
RESULT = "why: it follows from what an earlier stage makes"
PASSED_ON = "why: it passes on what another place in this list refuses"
INTERNAL = "why: no setting leads there; a caller's own mistake"
# A part of the message -> the check that has it before the first stage, or why there can be none.
REFUSALS = {
    "there is no such device here": ON_ITS_NODE,
    # meaning
    "has no images to judge": "ray_synth.data.dataset:require_every_class",
    "there is no meaning of": RESULT,
    "cannot be used: give at most 12 plain words": INTERNAL,
    "cannot go in a prompt as it is": "ray_synth.preflight.refusals:check_class_info",
    "the answer cache": ON_ITS_NODE,
    "needs clip.pretrained": CLIP,
    "cannot load the CLIP model": LOADED,
    "data.noun is not that of index.noun": EARLY,
    "holds no readable WordNet": EARLY,
    "no WordNet in": EARLY,
    "no token for the LLM": LLM,
    "llm.structured needs llm.style": LLM,
    "refuses the token": SERVER,
    "does not know": SERVER,
    "cannot be reached": SERVER,
    "refuses the question": SERVER,
    "fails (": SERVER,
    "has answered nothing to all": SERVER,
    "cannot load the LLM": LOADED,
    "is larger than its GPUs": LOADED,
    "timm_model_name": LOADED,
    "hf_model_name": LOADED,
    "is not a mapping of settings": LOADED,
    "would run code from elsewhere": LOADED,
    "is not of the type that it has": LOADED,
    "the embedded LLM": ON_ITS_NODE,
    "holds no GGUF file": ON_ITS_NODE,
    "no such GGUF file": LLM,
    "has no chat template": LOADED,
    # generators
    "BigGAN draws ImageNet": RESULT,
    "generator_kwargs.truncation": GENERATOR,
    "BigGAN takes no real images": GENERATOR,
    "generator_kwargs.class_map:": GENERATOR,
    "generator_kwargs.weights": GENERATOR,
    "BigGAN needs a library": GENERATOR,
    "is not BigGAN's": LOADED,
    "lacks {len(missing)} weights": LOADED,
    "is not a diffusers pipeline": GENERATOR,
    "unknown generator": GENERATOR,
    "needs generation.model": GENERATOR,
    "'endpoint' takes no real images": GENERATOR,
    "no token for the images": GENERATOR,
    "the plan has": "ray_synth.generators.registry:check_plan",
    "answers with addresses": SERVER,
    "refuses the request": SERVER,
    "or has no images API": SERVER,
    "the imported set has changed": RESULT,
    "names no imported image": INTERNAL,
    "the imported images are of": IMAGES,
    "needs generation.generator_kwargs.source": GENERATOR,
    "generation.adapters: ": GENERATOR,
    "all of its changes are 0": GENERATOR,
    "is another user's: set TMPDIR": ON_ITS_NODE,
    "holds no file": GENERATOR,
    "moves parts to a GPU in turn: there is none": IMAGES,
    "torch.compile of": ON_ITS_NODE,
    "set generation.compile: false": ON_ITS_NODE,
    "brings Python code of its own": GENERATOR,
    "diffusers has no scheduler": GENERATOR,
    "{text}": GENERATOR,  # a size that the family does not make
    "cannot load the generator": LOADED,
    "there are no characters to draw": IMAGES,
    "generation.reference needs image-to-image": IMAGES,
    "generation.reference.strength": GENERATOR,
    # prompting
    "prompting.negative_prompt is too long": PLAN,
    "prompting.styles: no such file": EARLY,
    "prompting.acceptance": EARLY,
    "is not YAML": EARLY,
    "must be a list of {{name, template}}": EARLY,
    "comes twice; names must differ": EARLY,
    "must have exactly the keys": EARLY,
    "the name must be a text": EARLY,
    "the template must hold": EARLY,
    "fewer than the {classes} classes": PRACTICE,
    "optimizer steps cannot be cut": PRACTICE,
    "prompting.practice.guidance": "ray_synth.generators.registry:check_guidance",
    "prompting.practice.select": "ray_synth.generation.usefulness:check_selection",
    "no learner in": RESULT,
    "has no guidance of a run": INTERNAL,
    "with other weights than the folder has now": RESULT,
    # generation and service
    "one image needs": ON_ITS_NODE,
    "images are not in": RESULT,
    "have the same sample_id": "ray_synth.pipeline.kept:check_kept",
    "found damaged again and again": ON_ITS_NODE,
    "fits none of the GPUs": LOADED,
    "mistake": PASSED_ON,
    "the thresholds were measured with the CLIP model": INTERNAL,
    "real image {position} of class index": "ray_synth.pipeline.sets:inspect_training",
    "found": "ray_synth.pipeline.sets:inspect_training",  # an image that CLIP cannot decode
    # training
    "unknown interpolation": INTERNAL,
    "unknown augmentation": RECIPE,
    "out of range: the classifier has": DATA,
    "no image of a whole batch could be decoded": RESULT,
    "no image to train on could be decoded": "ray_synth.pipeline.sets:inspect_training",
    "was called outside of `domain_split`": INTERNAL,
    "the domain split says": INTERNAL,
    "a domain split needs counts": INTERNAL,
    "unknown BN": INTERNAL,
    "keeps no running statistics": RECIPE,
    "without running statistics cannot be averaged": RECIPE,
    "no synthetic image was accepted": RESULT,
    "training.baseline {training.baseline}": RECIPE,
    "unknown timm model": RECIPE,
    "refuses model_kwargs": RECIPE,
    "timm model {name!r} cannot be loaded": LOADED,
    "timm has no weights of": RECIPE,
    "unknown optimizer": RECIPE,
    "refuses training.optimizer.kwargs": RECIPE,
    "training.optimizer.schedule_kwargs": RECIPE,
    "must be an existing .safetensors file": RECIPE,
    "is not a complete safetensors file": RECIPE,
    "it is of another architecture": RECIPE,
    "temporary file in": ON_ITS_NODE,
    "(error)": RESULT,  # the loss was not finite
    "nothing is left for the subject": PLAN,
    "leaves no image to make": BUDGETS,
    "which is no class": BUDGETS,
    # evaluation and report
    "has no image of any class; check its path": DATA,
    "has no results: not one": "ray_synth.pipeline.sets:inspect_tests",
    "the evaluation has no results": "ray_synth.pipeline.sets:inspect_tests",
    "holds no run": INTERNAL,
    "columns {columns}": INTERNAL,
    # storage: written to at the start, and read as long as the run goes on
    "names no bucket": "ray_synth.cluster.connection:runs_folder",
    "cannot open": "ray_synth.cluster.connection:runs_folder",
    "names no storage account": "ray_synth.cluster.connection:runs_folder",
    "unknown option": "ray_synth.cluster.connection:runs_folder",
    "cannot {what}": ON_ITS_NODE,
}  # fmt: skip


def raised() -> Iterator[tuple[str, str]]:
    """(module and line, what is raised) of every UserError in the rooms' modules."""
    for path in sorted((ROOT / "ray_synth").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "ray_synth").with_suffix("").parts)
        if not name.startswith(ROOMS) or name in OTHERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                text = ast.unparse(node.exc)
                if text.startswith("UserError("):
                    yield f"{name}:{node.lineno}", text.removeprefix("UserError")


def test_every_refusal_of_a_later_stage_is_listed():
    """A new one must say which check has it before anything is spent, or why none can."""
    unlisted = [
        f"{place}: {text[:120]}"
        for place, text in raised()
        if not any(part in text for part in REFUSALS)
    ]
    assert unlisted == []
    assert len(list(raised())) > 60


def test_the_listed_checks_exist_and_a_run_begins_with_them():
    for answer in set(REFUSALS.values()):
        if not answer.startswith("why: "):
            module, _, name = answer.partition(":")
            assert callable(getattr(importlib.import_module(module), name)), answer


def save_checkpoint(path, **shapes):
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["meaning.clip={model: ViT-B-32}"], "needs clip.pretrained"),
        (["meaning.clip={model: ViT-B-33, pretrained: x}"], "no model 'ViT-B-33': did you mean"),
        (["meaning.clip={model: ViT-B-32, pretrained: laion}"], "no weights 'laion' of ViT-B-32"),
        (["meaning.llm={backend: openai, model: m, api_key_env: NOT_SET_HERE}"], "no token"),
        (
            ["meaning.llm={backend: openai, model: m, base_url: 'http://x', structured: true, "
             "style: completion}"],
            "structured needs llm.style",
        ),
        (["meaning.llm.model=nowhere.gguf"], "no such GGUF file"),
        (["meaning.lexicon=/no/such/wordnet"], "no WordNet in|holds no readable"),
        (["generation.generator=glyphs", "data.class_names=[owls, zero, one, two, three, four, five, "
          "six, seven, eight]", "data.train.class_map={nine: owls, zero: zero, one: one, two: two, "
          "three: three, four: four, five: five, six: six, seven: seven, eight: eight}"],
         "no characters to draw for class 'owls'"),
        (["generation.adapters=[nowhere.safetensors]"], "generation.adapters: no such file"),
        (["generation.adapters=[{path: a.safetensors, kind: ip_adapter}]", "generation.reference={}"],
         "generation.adapters: no such file: a.safetensors"),
        (["generation.offload=true"], "generation.num_gpus is 0: there is none"),
        (["training.checkpoint=nowhere.safetensors"], "must be an existing .safetensors file"),
        (["training.checkpoint=OTHER"], "it is of another architecture"),
        (["training.optimizer.schedule_kwargs={speed: 1}"], "schedule_kwargs: .*speed"),
        (["training.augment=imagenette"], "unknown augmentation policy"),
        (["training.optimizer.name=adamv"], "unknown optimizer"),
        (["training.recipe=resnet50_a2", "training.baseline=recipe"], "recipe resnet50_a2 has model"),
        (["prompting.styles=nowhere.yaml"], "no such file"),
        (["prompting.acceptance=nowhere"], "nowhere has no quality/acceptance.json"),
        (["generation.generator=imported",
          "generation.generator_kwargs={source: {format: digits, split: train}}",
          "data.class_names=[owl]", "data.train.class_map={one: owl}", "data.test.class_map={one: owl}",
          "data.ood={}"], r"the imported images are of eight, .*none of which is a class \(owl\)"),
        (["generation.generator=endpoint", "generation.model=m",
          "generation.generator_kwargs={base_url: 'http://x/v1', max_images: 10}"], "the plan has 1,200"),
        (["prompting.fill_to=5"], "fill_to 5 leaves no image to make"),
        (["prompting.class_multipliers={owl: 3}"], "'owl', which is no class"),
    ],
)  # fmt: skip
def test_it_is_refused_before_anything_is_spent(settings, says, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    other = save_checkpoint(tmp_path / "other.safetensors", weight=(3,))
    settings = [setting.replace("OTHER", str(other)) for setting in settings]
    config = load_config(QUICKSTART, [f"runs_dir={tmp_path / 'runs'}", *settings])
    with pytest.raises(ValueError, match=says):
        check_run(config)
    assert not (tmp_path / "runs").exists()


def test_what_is_elsewhere_is_not_judged_by_this_machine():
    config = load_config(
        QUICKSTART, ["meaning.llm={backend: openai, model: m, api_key_env: NOT_SET_HERE}"]
    )
    check_llm(config.meaning.llm, local=False)
    gone = load_config(QUICKSTART, ["meaning.llm.model=/on/the/nodes/model.gguf"])
    check_llm(gone.meaning.llm, local=False)


def test_models_that_are_there_pass():
    config = load_config(
        QUICKSTART, ["meaning.clip={model: ViT-B-32, pretrained: laion2b_s34b_b79k}"]
    )
    check_clip(config.meaning.clip)
    check_clip(load_config(QUICKSTART).meaning.clip)


def test_a_batch_norm_that_cannot_be_averaged_is_refused_before_training():
    from ray_synth.training.dual_bn import check_dual_bn

    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="BatchNorm layer 0 keeps no running statistics"):
        check_dual_bn(model)
    check_dual_bn(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
