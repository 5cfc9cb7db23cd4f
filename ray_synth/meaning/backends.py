"""The language model that a config names."""

from __future__ import annotations

from typing import Any

from ray_synth.config import LlmConfig
from ray_synth.meaning.answer_cache import AnswerCache, CachedLLM
from ray_synth.meaning.language_model import Llm
from ray_synth.meaning.openai_llm import OpenAILLM
from ray_synth.meaning.sampling import SAMPLER
from ray_synth.meaning.transformers_llm import TransformersLLM


def load_llm(config: LlmConfig, *, num_threads: int | None = None) -> Llm:
    """Load the model, or connect to its server.

    Raises:
        UserError: see `TransformersLLM` and `OpenAILLM`; or the cache folder cannot be used.
    """
    llm: Any
    if config.backend == "openai":
        llm = OpenAILLM(
            config.model,
            base_url=config.base_url,
            api_key_env=config.api_key_env,
            timeout_s=config.timeout_s,
            requests_per_minute=config.requests_per_minute,
            max_concurrency=config.max_batch_size,
            style=config.style,
            structured=config.structured,
        )
    else:
        llm = TransformersLLM(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            device=config.device,
            spread=config.num_gpus > 1,
            max_batch_size=config.max_batch_size,
            num_threads=num_threads,
            style=config.style,
        )
    if config.cache_dir is None:
        return llm
    identity = config.model_dump(include={"backend", "model", "revision", "base_url", "structured"})
    sampled = {"sampler": SAMPLER} if config.backend == "transformers" else {}
    return CachedLLM(llm, AnswerCache(config.cache_dir), identity | {"style": llm.style} | sampled)
