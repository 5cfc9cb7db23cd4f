"""Meanings and contexts out of the LLM and CLIP deployments: what the service's operations share."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import numpy as np
from fastapi import HTTPException
from pydantic import Field
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from ray_synth.config import ClipConfig, LlmConfig, Replicas, Section
from ray_synth.errors import UserError
from ray_synth.meaning.ambiguity import Models, resolve_meaning
from ray_synth.meaning.background import Background, beside
from ray_synth.meaning.few_shot import FewShot
from ray_synth.meaning.lexicon import installed_lexicon
from ray_synth.prompting.contexts import write_contexts
from ray_synth.service.limits import Limits
from ray_synth.service.measurements import Metrics
from ray_synth.service.turns import CALLER


class ServeConfig(Section):
    """Arguments of the app (`args:` in a Serve config)."""

    llm: LlmConfig = LlmConfig()
    clip: ClipConfig = ClipConfig()
    limits: Limits = Limits()
    lexicon: str = "auto"
    replicas: Replicas = 1
    autoscaling: dict[str, float] = Field(
        default_factory=dict,
        description="Ray Serve's, for all deployments: upscale_delay_s, look_back_period_s, ...",
    )


async def _ask(method: Any, *args: Any) -> Any:
    """The answer of another deployment; asked again, of another replica, where one dies over it."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(RayActorError),
        stop=stop_after_attempt(6),
        wait=wait_exponential(0.1, max=5),
        reraise=True,
    ):
        with attempt:
            return await method.remote(*args)


class Resolver:
    """Asks both models, each through its handle; any replica of theirs may die over a question."""

    def __init__(self, config: ServeConfig, llm: DeploymentHandle, clip: DeploymentHandle) -> None:
        self.config, self.llm, self.clip = config, llm, clip
        lexicon = installed_lexicon(config.lexicon)
        self.senses = lexicon.candidates if lexicon else None
        self.metrics = Metrics()
        self.clip_facts: dict[str, Any] = {}
        self.shipped: Background | None = None

    async def complete(self, prompt: FewShot, seed: int, **options: Any) -> str:
        """One answer of the LLM deployment."""
        request = {
            "prompt": prompt,
            "seed": seed,
            "max_new_tokens": options.get("max_new_tokens", 64),
            "temperature": options.get("temperature", 0.8),
            "stop": options.get("stop", ("\n\n",)),
        }
        self.metrics.asked()
        return await _ask(self.llm.complete, request, CALLER.get())

    async def embed_texts(self, texts: list[str]) -> Any:
        """(n, dim) unit rows."""
        return await _ask(self.clip.encode_texts, texts, CALLER.get())

    async def embed_images(self, images: list[bytes]) -> np.ndarray | None:
        """(n, dim) unit rows; None for none. Raises UserError naming the image that is wrong."""
        if not images:
            return None
        found = await _ask(self.clip.encode_images, images, CALLER.get())
        if isinstance(found, str):
            raise UserError(found)
        return found

    async def likelihood(self, prompts: list[Any], answers: list[str]) -> list[float] | None:
        """Log-probabilities of answers, where the LLM says them."""
        return await _ask(self.llm.likelihood, (prompts, answers), CALLER.get())

    async def resolve(
        self,
        class_name: str,
        images: list[bytes] | np.ndarray | None,
        others: Background | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The class's entry of meanings.json (paper, section 3.1); options as `resolve_meaning`.

        Args:
            others: sums over the other classes' images, where they are known.
        """
        if not self.clip_facts:
            self.shipped = await _ask(self.clip.background)
            self.clip_facts = await _ask(self.clip.describe)  # last: it says that both are there
        # a caller who gives the meanings and asks for no more has them ranked alone
        closed = options.get("meanings") and options.get("num_meanings") == 0
        senses = None if closed and self.config.lexicon == "auto" else self.senses
        features = await self.embed_images(images) if isinstance(images, list) else images
        entry = await resolve_meaning(
            class_name,
            image_features=features,
            models=Models(self.complete, self.embed_texts, self.likelihood, senses),
            background=beside(others, self.shipped),
            temperature=self.clip_facts["temperature"],
            merge_at=self.clip_facts["merge_at"],
            **options,
        )
        self.metrics.resolved(entry)
        return {**entry, "llm": self.config.llm.model, "clip": self.config.clip.model}

    async def contexts(
        self, class_name: str, meaning: str, *, num_contexts: int, retries: int = 3, seed: int = 0
    ) -> dict[str, Any]:
        """Scenes for the class, each with its source, and the LLM's raw answers."""
        result = await write_contexts(
            class_name,
            meaning,
            complete=self.complete,
            num_contexts=num_contexts,
            retries=retries,
            seed=seed,
        )
        self.metrics.refused(result.refused)
        return result.as_dict()

    async def answered(self, work: Awaitable[Any]) -> Any:
        """The result within the time limit; HTTPException 422 for what is the caller's to fix."""
        limit = self.config.limits.timeout_s
        try:
            async with asyncio.timeout(limit):
                return await work
        except TimeoutError:
            raise HTTPException(504, f"no answer within {limit:g} s: ask again later") from None
        except RayTaskError as error:  # a UserError of a replica's, such as an LLM server's refusal
            if isinstance(error, UserError):
                raise HTTPException(502, str(error.cause)) from None
            raise
        except RayActorError:
            raise HTTPException(
                503, "a model is being started again: ask again", {"Retry-After": "2"}
            ) from None
        except UserError as error:
            raise HTTPException(422, str(error)) from None
