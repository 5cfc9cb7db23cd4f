"""What a config asks of a diffusers model: settings it leaves open, size, tokens, digest, and advice.

In: the generation section of a config, and the small files of the model that it names. Out: the same
section with nothing open, and what is wrong or unwise in it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ray_synth.config import GenerationConfig
from ray_synth.errors import UserError
from ray_synth.generators.adapter_files import adapters_identity
from ray_synth.generators.adapters import add_words
from ray_synth.generators.families import Family, read_facts, recognise
from ray_synth.generators.loading import read_index, resolve_model
from ray_synth.generators.protocol import digest_settings
from ray_synth.storage.checkpoints import no_code

FEWEST_OF_TEACHERS = 10  # steps below which a model that is not distilled blurs
AREAS = (0.3, 2.0)  # of the area that a model was trained on: what it still makes well


def family_of(config: GenerationConfig) -> Family:
    """The family of the model that a config names.

    Raises:
        UserError: it cannot be read.
    """
    return _family(config.model, config.revision, config.scheduler)


@lru_cache(maxsize=64)
def _family(model: str, revision: str | None, scheduler: str | None) -> Family:
    config = GenerationConfig(model=model, revision=revision)
    return recognise(read_facts(resolve_model(model), read_index(config), revision, scheduler))


def filled(config: GenerationConfig) -> GenerationConfig:
    """The config with steps, guidance and size as the family has them, where it leaves them open.

    Raises:
        UserError: the model cannot be read.
    """
    values = (config.width, config.height, config.num_inference_steps, config.guidance_scale)
    if None not in values:
        return config
    family = family_of(config)
    own = {
        "width": family.size,
        "height": family.size,
        "num_inference_steps": family.steps,
        "guidance_scale": family.guidance,
    }
    return config.model_copy(
        update={name: value for name, value in own.items() if getattr(config, name) is None}
    )


def check_size(config: GenerationConfig) -> None:
    """Raises UserError for a size that the pipeline would refuse, or make another one in its place."""
    family = family_of(config)
    width, height = image_size(config)
    text = f"generation.width and height {width} x {height}: {family.name} makes "
    if family.sizes and (width, height) not in family.sizes:
        raise UserError(f"{text}{', '.join(f'{w} x {h}' for w, h in family.sizes)}")
    if width % family.multiple or height % family.multiple:
        raise UserError(f"{text}multiples of {family.multiple}")


def image_size(config: GenerationConfig) -> tuple[int, int]:
    """(width, height) in pixels."""
    config = filled(config)
    assert config.width is not None
    assert config.height is not None
    return config.width, config.height


def fingerprint(config: GenerationConfig) -> str:
    """A short hex digest of the weights and of all settings that decide the pixels."""
    model = resolve_model(config.model)
    config = filled(config)
    settings = config.model_dump(
        include={
            "scheduler", "dtype", "width", "height", "num_inference_steps", "guidance_scale",
            "variant",
        }
    )  # fmt: skip
    settings |= config.encoding
    if config.reference is not None and config.ip_adapter is None:
        settings["strength"] = config.reference.strength
    folder = Path(model)
    identity = _folder_digest(folder) if folder.is_dir() else [model, config.revision]
    if config.adapters:
        settings["adapters"] = adapters_identity(config.adapters)
    return digest_settings([identity, settings])


def prompt_tokens(config: GenerationConfig) -> tuple[Callable[[str], int], int]:
    """How the text encoder that reads most counts, and the tokens that a prompt may have.

    T5 and language models read hundreds, beside CLIP's 77, which then sees the beginning alone.
    """
    import diffusers
    from transformers import AutoTokenizer

    index, family = read_index(config), family_of(config)
    part = reading_tokenizer(index)
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_model(config.model), subfolder=part, revision=config.revision, **no_code()
    )
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    call = inspect.signature(kind.__call__).parameters if kind else {}
    named = call["max_sequence_length"].default if "max_sequence_length" in call else None
    limit = family.context or named or 300  # where a T5 says that it has no limit
    limit = min(limit, int(tokenizer.model_max_length))
    longer = add_words(tokenizer, part.removeprefix("tokenizer"), config.adapters)

    def count(text: str) -> int:
        for word, tokens in longer.items():
            text = text.replace(word, tokens)
        return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])

    return count, limit - family.template


def reading_tokenizer(index: dict[str, Any]) -> str:
    """The folder of the tokenizer whose text encoder reads most: the first that is not CLIP's.

    Args:
        index: of a pipeline. SD 3 may come without its T5.
    """
    parts = {}
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        encoder = index.get(name.replace("tokenizer", "text_encoder")) or [None]
        if encoder[0] and (index.get(name) or [None])[0]:
            parts[name] = str(index[name][1])
    others = [name for name, kind in parts.items() if "CLIP" not in kind]
    return [*others, *parts, "tokenizer"][0]


def advice(config: GenerationConfig, negative_prompt: str = "") -> list[str]:
    """What is unwise in a config for the family of its model, each with what to set instead.

    Args:
        negative_prompt: that prompts will have.
    """
    family, config = family_of(config), filled(config)
    steps, guidance = config.num_inference_steps, config.guidance_scale
    assert steps is not None
    assert guidance is not None
    found = []
    if guidance > family.most_guidance:
        found.append(
            f"generation.guidance_scale {guidance:g}: {family.name} "
            f"{'is distilled to run without' if family.guidance <= 1 else 'was not made for so much'}"
            f": set {family.guidance:g}"
        )
    elif family.guidance > 1 >= guidance and family.guided_above <= 1:
        found.append(
            f"generation.guidance_scale {guidance:g}: without guidance, images of {family.name} hardly "
            f"follow their prompts; it is made for about {family.guidance:g}"
        )
    if steps > family.most_steps:
        found.append(
            f"generation.num_inference_steps {steps}: {family.name} is distilled to run in "
            f"{family.steps}; more take longer and gain nothing"
        )
    elif not family.distilled and steps < FEWEST_OF_TEACHERS:
        found.append(
            f"generation.num_inference_steps {steps}: {family.name} is not distilled, and blurs below "
            f"about {FEWEST_OF_TEACHERS}; it is made for {family.steps}"
        )
    width, height = image_size(config)
    share = width * height / family.size**2
    if not AREAS[0] <= share <= AREAS[1]:
        found.append(
            f"generation.width and height {width} x {height}: {family.name} was trained on "
            f"{family.size} x {family.size}, and "
            f"{'repeats itself' if share > 1 else 'loses its shapes'} so far from it"
        )
    if config.dtype == "float16" and not family.float16:
        found.append(
            f"generation.dtype float16: activations of {family.name} leave its range, and images turn "
            "black; set auto, or bfloat16"
        )
    if negative_prompt and guidance <= family.guided_above:
        found.append(
            f"prompting.negative_prompt counts with guidance alone, and guidance_scale {guidance:g} of "
            f"{family.name} has none"
        )
    return found


def _folder_digest(folder: Path) -> str:
    """Configs by content; weights by name, size and header, so that it is quick for any size."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".txt", ".model"):
            with path.open("rb") as file:
                head = file.read(1 << 20)
            digest.update(f"{path.relative_to(folder)}:{path.stat().st_size}".encode() + head)
    return digest.hexdigest()[:16]
