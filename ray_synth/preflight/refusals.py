"""What later stages would refuse, looked for before the first one spends anything.

Each check is the later one itself, or asks what it asks. What only a node, a server or a stage's own
result can tell is not here; tests/preflight/test_refusals.py lists both kinds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ray_synth.config import ClipConfig, Config, LlmConfig
from ray_synth.data.class_info import read_class_info
from ray_synth.errors import UserError, did_you_mean
from ray_synth.generation.draws import EarlierRun
from ray_synth.meaning.told import as_told
from ray_synth.preflight.demands import asks_for_contexts
from ray_synth.prompting.styles import load_styles
from ray_synth.storage.folder import Folder
from ray_synth.storage.texts import read_json


def refuse_early(
    config: Config, class_names: Sequence[str], todo: Collection[str], *, local: bool
) -> None:
    """Raises UserError where a stage that is to do would.

    Args:
        local: all stages run on this machine, so that its files and variables are theirs.
    """
    meaning, generation = config.meaning, config.generation
    asked = (meaning.enabled and "meaning" in todo) or (
        asks_for_contexts(config) and "plan" in todo
    )
    if asked:
        check_llm(meaning.llm, local=local)
    judged = generation.checks.need_clip
    if asked or (judged and {"quality", "generation", "training"} & set(todo)):
        check_clip(meaning.clip)
    named = meaning.lexicon not in ("auto", "off")
    if local and meaning.enabled and named and "meaning" in todo:
        from ray_synth.meaning.lexicon import installed_lexicon

        installed_lexicon(meaning.lexicon)
    if "meaning" in todo:
        check_class_info(config, class_names)
    if "plan" in todo:
        load_styles(config.prompting.styles)
        if config.prompting.acceptance:
            EarlierRun(Folder(config.prompting.acceptance))
    if "generation" in todo or "training" in todo:
        check_images(config, class_names)


def check_class_info(config: Config, class_names: Sequence[str]) -> None:
    """Raises UserError where `data.class_info` cannot be read, or holds what cannot go in a prompt."""
    for name, info in read_class_info(config.data.class_info, class_names).items():
        try:
            as_told(info, config.meaning.context)
        except UserError as error:
            raise UserError(f"data.class_info of {name!r}: {error}") from None


def check_llm(llm: LlmConfig, *, local: bool) -> None:
    """The language model's settings.

    Raises:
        UserError: no token, no such file, or a style that it cannot have.
    """
    if llm.backend == "openai":
        from ray_synth.meaning.openai_llm import OpenAILLM

        url = llm.base_url if local else llm.base_url or "https://elsewhere"
        OpenAILLM(  # asks nothing; elsewhere the token is in the nodes' own environment
            llm.model,
            base_url=url,
            api_key_env=llm.api_key_env,
            style=llm.style,
            structured=llm.structured,
        )
    elif local and llm.model.endswith(".gguf") and not Path(llm.model).expanduser().is_file():
        raise UserError(f"meaning.llm.model: no such GGUF file: {llm.model}")


def check_clip(clip: ClipConfig) -> None:
    """The CLIP model's name and weights, by open_clip's own lists.

    Raises:
        UserError: it has no weights, or open_clip knows no such model or tag.
    """
    if clip.model.startswith(("embedded", "local-dir:", "hf-hub:")):
        return
    if clip.pretrained is None:
        raise UserError(
            f"clip.model {clip.model!r} needs clip.pretrained (a tag such as 'laion2b_s34b_b79k'); "
            "without it the weights would be random"
        )
    import open_clip

    models = open_clip.list_models()
    if clip.model not in models:
        raise UserError(
            f"open_clip has no model {clip.model!r}: {did_you_mean(clip.model, models)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(clip.model)
    if clip.pretrained not in tags and not Path(clip.pretrained).exists():
        raise UserError(
            f"open_clip has no weights {clip.pretrained!r} of {clip.model}: "
            f"{did_you_mean(clip.pretrained, tags)}"
        )


def check_images(config: Config, class_names: Sequence[str]) -> None:
    """What the generator would refuse of the classes, of guiding images, or for want of a GPU.

    Raises:
        UserError: a class that it cannot draw; no image-to-image for the model; no GPU to offload from.
    """
    from ray_synth.generators.registry import generator_class

    generation = config.generation
    draws = getattr(generator_class(generation.generator), "check_classes", None)
    if draws is not None:
        draws(generation, class_names)
    if generation.generator != "diffusers":
        return
    if generation.offload and not generation.num_gpus and generation.device == "auto":
        raise UserError(
            "generation.offload moves parts to a GPU in turn, and generation.num_gpus is 0: there is none"
        )
    if generation.reference is not None and generation.ip_adapter is None:
        _check_image_to_image(config)


def _check_image_to_image(config: Config) -> None:
    """Raises UserError where diffusers has no image-to-image pipeline of the model's family."""

    from diffusers.pipelines.auto_pipeline import (
        AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        _get_task_class,
    )

    from ray_synth.preflight.model_sizes import model_folder

    folder = model_folder(config.generation.model, config.generation.revision)
    if folder is None or not (folder / "model_index.json").is_file():
        return
    family = read_json(folder / "model_index.json").get("_class_name", "")
    if _get_task_class(AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, family, False) is None:
        raise UserError(
            f"generation.reference needs image-to-image, and diffusers has none for {family}; leave "
            "generation.reference out, or take a Stable Diffusion, SDXL, SD 3 or Flux model"
        )
