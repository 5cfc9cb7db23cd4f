"""The disambiguation service: FastAPI in front of the LLM and CLIP deployments.

    ray-synth serve run serve/config.yaml
    curl localhost:8000/disambiguate -H 'content-type: application/json' -d '{"class_name": ...}'

The pipeline asks the same app through its handle (`resolve`, `contexts`).
"""

# No postponed annotations here: Serve wraps the methods, and FastAPI could not resolve them then.
import asyncio
import hmac
import os
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import Field
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from ray_synth.config import ClipConfig, LlmConfig, Replicas, Section
from ray_synth.meaning.ambiguity import Models, resolve_meaning
from ray_synth.meaning.candidates import siblings_context
from ray_synth.meaning.lexicon import WordNet
from ray_synth.meaning.llm import FewShot
from ray_synth.messages import (
    Answer,
    BatchBody,
    ClassQuestion,
    DisambiguateBody,
    LimitsAnswer,
    Line,
    PromptsAnswer,
    PromptsBody,
)
from ray_synth.prompting.contexts import Context, contextual_prompt, write_contexts
from ray_synth.prompting.styles import load_styles, stylized_prompt
from serve.clip import ClipDeployment
from serve.limits import BodyLimit, Limits, read_images
from serve.llm import LlmDeployment
from serve.metrics import Metrics
from serve.problems import documented, install_handlers, problem

TOKEN_VARIABLE = "RAY_SYNTH_SERVE_TOKEN"
PAGE = (Path(__file__).parent / "page.html").read_text()
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
INGRESS_CPUS = 0.1
CLASSES_AT_ONCE = 32  # of a batch: enough to fill the models' batches


class ServeConfig(Section):
    """Arguments of the app (`args:` in a Serve config)."""

    llm: LlmConfig = LlmConfig()
    clip: ClipConfig = ClipConfig()
    limits: Limits = Limits()
    lexicon: str = "off"
    replicas: Replicas = 1
    autoscaling: dict[str, float] = Field(default_factory=dict)


api = FastAPI(
    title="ray-synth",
    summary="What does a class name mean, judged by its images?",
    responses=documented(401, 413, 500, 503),
)
api.add_middleware(BodyLimit)
install_handlers(api)
bearer = HTTPBearer(auto_error=False, description=f"where the service has a {TOKEN_VARIABLE}")


async def check_token(request: Request, _: Any = Depends(bearer)) -> None:
    """Where a token is set in the environment, require it."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not hmac.compare_digest(given.encode(), token.encode()):
        raise HTTPException(
            401, "send the header 'Authorization: Bearer TOKEN'", {"WWW-Authenticate": "Bearer"}
        )


GUARDED: dict[str, Any] = {
    "dependencies": [Depends(check_token)],
    "openapi_extra": {"security": [{}]},  # or none: where no token is set
}
ASKED: dict[str, Any] = {**GUARDED, "responses": documented(400, 422, 502, 504)}


def _count_words(text: str) -> int:
    """A bound on CLIP's tokens where no image generator is at hand: its marks and 1.4 a word."""
    return 2 + int(1.4 * len(text.replace(",", " , ").split()) + 0.5)


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


@serve.deployment(name="Disambiguation", max_ongoing_requests=512)
@serve.ingress(api)
class Disambiguation:
    """The ingress: checks input, and composes the LLM and CLIP into meanings and prompts."""

    def __init__(self, config: ServeConfig, llm: DeploymentHandle, clip: DeploymentHandle) -> None:
        self.config, self.llm, self.clip = config, llm, clip
        self.styles = load_styles()
        self.senses = None if config.lexicon == "off" else WordNet(config.lexicon).senses
        self.metrics = Metrics()
        self.clip_facts: dict[str, Any] = {}
        BodyLimit.limit = config.limits.max_body_bytes

    async def complete(self, prompt: FewShot, seed: int, **options: Any) -> str:
        """One answer of the LLM deployment."""
        request = {
            "prompt": prompt,
            "seed": seed,
            "max_new_tokens": options.get("max_new_tokens", 64),
            "temperature": options.get("temperature", 0.8),
            "stop": options.get("stop", ("\n\n",)),
        }
        return await _ask(self.llm.complete, request)

    async def embed_texts(self, texts: list[str]) -> Any:
        """(n, dim) unit rows."""
        return await _ask(self.clip.encode_texts, texts)

    async def embed_images(self, images: list[bytes]) -> np.ndarray | None:
        """(n, dim) unit rows; None for none. Raises ValueError naming the image that is wrong."""
        if not images:
            return None
        found = await _ask(self.clip.encode_images, images)
        if isinstance(found, str):
            raise ValueError(found)
        return found

    async def likelihood(self, prompts: list[Any], answers: list[str]) -> list[float] | None:
        """Log-probabilities of answers, where the LLM says them."""
        return await _ask(self.llm.likelihood, (prompts, answers))

    async def resolve(
        self, class_name: str, images: list[bytes] | np.ndarray | None, **options: Any
    ) -> dict[str, Any]:
        """The class's entry of meanings.json (paper, section 3.1); options as `resolve_meaning`."""
        if not self.clip_facts:
            self.clip_facts = await _ask(self.clip.describe)
        features = await self.embed_images(images) if isinstance(images, list) else images
        entry = await resolve_meaning(
            class_name,
            image_features=features,
            models=Models(self.complete, self.embed_texts, self.likelihood, self.senses),
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
        return result.as_dict()

    async def _answered(self, work: Awaitable[Any]) -> Any:
        """The result within the time limit; HTTPException 422 for what is the caller's to mend."""
        limit = self.config.limits.timeout_s
        try:
            async with asyncio.timeout(limit):
                return await work
        except TimeoutError:
            raise HTTPException(504, f"no answer within {limit:g} s: ask again later") from None
        except (
            RayTaskError
        ) as error:  # a ValueError of a replica's, such as an LLM server's refusal
            if isinstance(error, ValueError):
                raise HTTPException(502, str(error.cause)) from None
            raise
        except RayActorError:
            raise HTTPException(503, "a model is being started again: ask again") from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    @api.post("/disambiguate", response_model=Answer, **ASKED)
    async def disambiguate(self, body: DisambiguateBody) -> dict[str, Any]:
        """Which meaning of a class name do these images show, or does this context speak of?"""

        async def work() -> dict[str, Any]:
            return await self.resolve(
                body.class_name,
                await read_images(body.images, self.config.limits),
                num_meanings=body.num_meanings,
                seed=body.seed,
                meanings=body.meanings,
                context=body.context,
            )

        with self.metrics.timed("disambiguate"):
            return await self._answered(work())

    @api.post(
        "/disambiguate/batch",
        response_class=StreamingResponse,
        **{
            **GUARDED,
            "responses": {**documented(400, 422), 200: {"content": {"application/x-ndjson": {}}}},
        },
    )
    async def batch(self, body: BatchBody) -> StreamingResponse:
        """A whole class list, a line of JSON a class as it is resolved.

        What speaks for every class's images speaks for none of them, and where a class has neither
        images nor a context, its siblings' names are the context.
        """
        if len(body.classes) > self.config.limits.max_classes:
            limit = self.config.limits.max_classes
            raise HTTPException(422, f"classes: {len(body.classes)} given, at most {limit}")
        names = [question.class_name for question in body.classes]
        if len(set(names)) < len(names):
            raise HTTPException(422, "classes: give each class_name once")
        return StreamingResponse(self._lines(body, names), media_type="application/x-ndjson")

    async def _lines(self, body: BatchBody, names: list[str]) -> AsyncIterator[str]:
        features: dict[str, np.ndarray | None] = {}
        gate = asyncio.Semaphore(CLASSES_AT_ONCE)

        async def see(question: ClassQuestion) -> Line | None:
            async def work() -> Any:
                images = await read_images(question.images, self.config.limits)
                return await self.embed_images(images)

            async with gate:
                found = await self._line(question, work())
            if isinstance(found, Line):
                return found
            features[question.class_name] = found
            return None

        async def ask(question: ClassQuestion) -> Line:
            own = features[question.class_name]
            others = [rows for name, rows in features.items() if name != question.class_name]
            seen = [rows for rows in others if rows is not None]
            work = self.resolve(
                question.class_name,
                own,
                num_meanings=body.num_meanings,
                seed=body.seed,
                meanings=question.meanings,
                context=body.context
                or (siblings_context(question.class_name, names) if own is None else None),
                reference_features=np.concatenate(seen) if seen else None,
            )
            async with gate:
                found = await self._line(question, work)
            if isinstance(found, Line):
                return found
            return Line(class_name=question.class_name, answer=Answer(**found))

        with self.metrics.timed("batch"):
            refused = await asyncio.gather(*(see(question) for question in body.classes))
            for line in refused:
                if line is not None:
                    yield line.model_dump_json(exclude_none=True) + "\n"
            todo = [
                asyncio.ensure_future(ask(question))
                for question in body.classes
                if question.class_name in features
            ]
            try:
                for done in asyncio.as_completed(todo):
                    yield (await done).model_dump_json(exclude_none=True) + "\n"
            finally:
                for task in todo:  # a caller who went away is not worked for
                    task.cancel()

    async def _line(self, question: ClassQuestion, work: Awaitable[Any]) -> Any:
        """The result, or the line that says what was wrong: one class never ends the others."""
        try:
            return await self._answered(work)
        except HTTPException as error:
            trouble = problem(error.status_code, str(error.detail))
        except Exception as error:
            self.metrics.log_failure(error)
            trouble = problem(500, "the service failed on this class; its log says why")
        return Line(class_name=question.class_name, problem=trouble)

    @api.post("/prompts", response_model=PromptsAnswer, **ASKED)
    async def prompts(self, body: PromptsBody) -> dict[str, Any]:
        """Contextual and stylized prompts for a class (paper, section 3.2)."""
        total = body.contextual + body.stylized
        if not 1 <= total <= self.config.limits.max_prompts:
            limit = self.config.limits.max_prompts
            raise HTTPException(422, f"{total} prompts asked for; ask for 1 to {limit}")
        meaning = body.meaning or body.class_name
        with self.metrics.timed("prompts"):
            found = await self._answered(
                self.contexts(
                    body.class_name, meaning, num_contexts=max(body.contextual, 1), seed=body.seed
                )
            )
        contexts = [Context(**item["context"]) for item in found["contexts"]]
        tokens: dict[str, Any] = {"count_tokens": _count_words, "max_tokens": 77}
        styles = (self.styles * (1 + body.stylized // len(self.styles)))[: body.stylized]
        return {
            "class_name": body.class_name,
            "meaning": meaning,
            "contextual": [
                {
                    "prompt": contextual_prompt(body.class_name, meaning, context, **tokens),
                    "source": item["source"],
                }
                for context, item in zip(contexts, found["contexts"], strict=True)
            ][: body.contextual],
            "stylized": [
                {
                    "prompt": stylized_prompt(
                        style, body.class_name, meaning, contexts[i % len(contexts)], **tokens
                    ),
                    "style": style.name,
                }
                for i, style in enumerate(styles)
            ],
        }

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """200 while the service lives."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz(self) -> dict[str, str]:
        """200 when both models answer."""
        try:
            async with asyncio.timeout(10):
                await asyncio.gather(self.llm.describe.remote(), self.clip.describe.remote())
        except (TimeoutError, RayActorError) as error:
            raise HTTPException(503, f"a model does not answer ({type(error).__name__})") from None
        return {"status": "ready"}

    @api.get("/models", **GUARDED)
    async def models(self) -> dict[str, dict[str, Any]]:
        """The models that answer, and how full their batches were."""
        llm, clip = await asyncio.gather(self.llm.describe.remote(), self.clip.describe.remote())
        return {"llm": llm, "clip": clip}

    @api.get("/limits", response_model=LimitsAnswer)
    async def limits(self) -> dict[str, Any]:
        """What one request may bring."""
        token = bool(os.environ.get(TOKEN_VARIABLE))
        return {**self.config.limits.model_dump(), "token_required": token}

    @api.get("/", include_in_schema=False)
    async def page(self) -> Response:
        """The page where a person drops images and types a name."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})


def build(config: ServeConfig) -> Application:
    """The app of a Serve config or of the pipeline."""
    llm, clip, limits = config.llm, config.clip, config.limits
    # a replica that is told to stop finishes what it was asked
    drain = {"graceful_shutdown_timeout_s": limits.timeout_s + 10}
    ingress: Any = Disambiguation.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_queued_requests=limits.max_queued_requests,
        **_replicas(config, busy=64),
        **drain,
    )
    deployments: list[Any] = []
    for deployment, model in ((LlmDeployment, llm), (ClipDeployment, clip)):
        options: dict[str, Any] = _replicas(model, busy=2 * model.max_batch_size)
        options["ray_actor_options"] = {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus}
        deployments.append(deployment.options(**options, **drain))  # type: ignore[attr-defined]
    return ingress.bind(
        config, deployments[0].bind(llm), deployments[1].bind(clip, limits.max_pixels)
    )


def _replicas(config: LlmConfig | ClipConfig | ServeConfig, *, busy: float) -> dict[str, Any]:
    """A number of replicas, or [fewest, most] with `busy` requests in work or waiting for each."""
    if isinstance(config.replicas, int):
        return {"num_replicas": config.replicas}
    fewest, most = config.replicas
    scaling = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": busy}
    return {"autoscaling_config": {**scaling, **config.autoscaling}}


__all__ = ["Disambiguation", "ServeConfig", "api", "build"]
