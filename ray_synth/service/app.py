"""The disambiguation service: FastAPI in front of the LLM and CLIP deployments.

    ray-synth serve run serve/config.yaml
    curl localhost:8000/disambiguate -H 'content-type: application/json' -d '{"class_name": ...}'

The pipeline asks the same app through its handle (`resolve`, `contexts`).
"""

# No postponed annotations here: Serve wraps the methods, and FastAPI could not resolve them then.
import asyncio
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from ray_synth.prompting.contexts import Context, contextual_prompt
from ray_synth.prompting.styles import load_styles, stylized_prompt
from ray_synth.service.batch import answer_lines
from ray_synth.service.clip_deployment import ClipDeployment
from ray_synth.service.docs_page import DOCS_POLICY, docs_page
from ray_synth.service.gate import TOKEN_VARIABLE, Gate, service_token
from ray_synth.service.limits import read_images
from ray_synth.service.llm_deployment import MAX_ONGOING, LlmDeployment
from ray_synth.service.messages import (
    Answer,
    BatchBody,
    DisambiguateBody,
    LimitsAnswer,
    PromptsAnswer,
    PromptsBody,
)
from ray_synth.service.problems import documented, install_handlers
from ray_synth.service.replicas import replica_options
from ray_synth.service.resolver import Resolver, ServeConfig

PAGE = (Path(__file__).parent / "page.html").read_text()
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
INGRESS_CPUS = 0.1
MODEL_FINISH_S = 30.0


api = FastAPI(
    title="ray-synth",
    summary="What does a class name mean, judged by its images?",
    responses=documented(401, 408, 413, 421, 500, 503),
    docs_url=None,  # FastAPI's own load their code from elsewhere
    redoc_url=None,
)
api.add_middleware(Gate)
install_handlers(api)
bearer = HTTPBearer(auto_error=False, description=f"where the service has a {TOKEN_VARIABLE}")

GUARDED: dict[str, Any] = {
    "dependencies": [Depends(bearer)],  # for OpenAPI; the gate requires it
    "openapi_extra": {"security": [{}]},  # or none: where no token is set
}
ASKED: dict[str, Any] = {**GUARDED, "responses": documented(400, 422, 502, 504)}


def _count_words(text: str) -> int:
    """A bound on CLIP's tokens where no image generator is available: its marks and 1.4 per word."""
    return 2 + int(1.4 * len(text.replace(",", " , ").split()) + 0.5)


@serve.deployment(name="Disambiguation", max_ongoing_requests=MAX_ONGOING)
@serve.ingress(api)
class Disambiguation(Resolver):
    """The ingress: checks input, and composes the LLM and CLIP into meanings and prompts."""

    def __init__(self, config: ServeConfig, llm: DeploymentHandle, clip: DeploymentHandle) -> None:
        super().__init__(config, llm, clip)
        self.styles = load_styles()
        Gate.open_with(config.limits)
        self._probe: asyncio.Task[Any] | None = None

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
            return await self.answered(work())

    @api.post(
        "/disambiguate/batch",
        response_class=StreamingResponse,
        **{
            **GUARDED,
            "responses": {**documented(400, 422), 200: {"content": {"application/x-ndjson": {}}}},
        },
    )
    async def batch(self, body: BatchBody) -> StreamingResponse:
        """A whole class list, one line of JSON per class as it is resolved; see `answer_lines`."""
        if len(body.classes) > self.config.limits.max_classes:
            limit = self.config.limits.max_classes
            raise HTTPException(422, f"classes: {len(body.classes)} given, at most {limit}")
        names = [question.class_name for question in body.classes]
        if len(set(names)) < len(names):
            raise HTTPException(422, "classes: give each class_name once")
        return StreamingResponse(answer_lines(body, self), media_type="application/x-ndjson")

    @api.post("/prompts", response_model=PromptsAnswer, **ASKED)
    async def prompts(self, body: PromptsBody) -> dict[str, Any]:
        """Contextual and stylized prompts for a class (paper, section 3.2)."""
        total = body.contextual + body.stylized
        if not 1 <= total <= self.config.limits.max_prompts:
            limit = self.config.limits.max_prompts
            raise HTTPException(422, f"{total} prompts asked for; ask for 1 to {limit}")
        meaning = body.meaning or body.class_name
        with self.metrics.timed("prompts"):
            found = await self.answered(
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
                if self._probe is None or self._probe.done():  # all who ask now share it
                    self._probe = asyncio.create_task(self._describe())
                await asyncio.shield(self._probe)
        except (TimeoutError, RayActorError) as error:
            raise HTTPException(503, f"a model does not answer ({type(error).__name__})") from None
        return {"status": "ready"}

    @api.get("/models", **GUARDED)
    async def models(self) -> dict[str, dict[str, Any]]:
        """The models that answer, and how full their batches were."""
        return await self._describe()

    async def _describe(self) -> dict[str, dict[str, Any]]:
        llm, clip = await asyncio.gather(self.llm.describe.remote(), self.clip.describe.remote())
        return {"llm": llm, "clip": clip}

    @api.get("/limits", response_model=LimitsAnswer)
    async def limits(self) -> dict[str, Any]:
        """What one request may bring."""
        return {**self.config.limits.model_dump(), "token_required": service_token() is not None}

    @api.get("/docs", include_in_schema=False)
    async def docs(self) -> Response:
        """The operations, as a page without code."""
        return HTMLResponse(
            docs_page(api.openapi()), headers={"Content-Security-Policy": DOCS_POLICY}
        )

    @api.get("/", include_in_schema=False)
    async def page(self) -> Response:
        """The page where a person drops images and types a name."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})


def build(config: ServeConfig) -> Application:
    """The app of a Serve config or of the pipeline."""
    llm, clip, limits = config.llm, config.clip, config.limits
    # A replica that is told to stop finishes what it was asked. On a node that is announced to go it is
    # told so this long before, if by then no other is ready: with a model's, which takes longest to be
    # ready and whose questions are asked again, the most is made of a notice of two minutes.
    finish_s = limits.timeout_s + 10
    ingress: Any = Disambiguation.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        graceful_shutdown_timeout_s=finish_s,
        **replica_options(config.replicas, config.autoscaling, busy=64),
    )
    deployments: list[Any] = []
    models: Any = ((LlmDeployment, llm), (ClipDeployment, clip))
    for deployment, model in models:
        options: dict[str, Any] = replica_options(
            model.replicas, config.autoscaling, busy=2 * model.max_batch_size
        )
        options["ray_actor_options"] = {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus}
        options["graceful_shutdown_timeout_s"] = min(finish_s, MODEL_FINISH_S)
        deployments.append(deployment.options(**options))
    return ingress.bind(
        config,
        deployments[0].bind(llm),
        deployments[1].bind(clip, limits.max_pixels, limits.decode_bytes),
    )


__all__ = ["Disambiguation", "ServeConfig", "api", "build"]
