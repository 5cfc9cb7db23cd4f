"""The disambiguation service: FastAPI in front of the LLM and CLIP deployments.

    serve run serve/config.yaml
    curl localhost:8000/disambiguate -H 'content-type: application/json' -d '{"class_name": ...}'

The pipeline asks the same app through its handle (`resolve`, `write_prompts`).
"""

# No postponed annotations here: Serve wraps the methods, and FastAPI could not resolve them then.
import asyncio
import base64
import binascii
import hmac
import os
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from ray_synth.config import ClipConfig, LlmConfig, Section
from ray_synth.data.images import decode_image
from ray_synth.meaning.ambiguity import resolve_meaning
from ray_synth.meaning.llm import FewShot
from ray_synth.prompting.contexts import Context, contextual_prompt, write_contexts
from ray_synth.prompting.styles import load_styles, stylized_prompt
from serve.clip import ClipDeployment
from serve.llm import LlmDeployment

TOKEN_VARIABLE = "RAY_SYNTH_SERVE_TOKEN"
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


class Limits(Section):
    """What one request may bring."""

    max_body_bytes: int = Field(32_000_000, ge=1)
    max_images: int = Field(64, ge=1)
    max_image_bytes: int = Field(10_000_000, ge=1)
    max_pixels: int = Field(50_000_000, ge=1)
    max_prompts: int = Field(200, ge=1)


class ServeConfig(Section):
    """Arguments of the app (`args:` in a Serve config)."""

    llm: LlmConfig = LlmConfig()
    clip: ClipConfig = ClipConfig()
    limits: Limits = Limits()


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DisambiguateBody(Body):
    class_name: Name
    images: list[str] = Field(min_length=1, description="base64 of image files")
    meanings: list[Name] | None = Field(None, max_length=50, description="candidates to add")
    num_meanings: int = Field(5, ge=1, le=20, description="phrases asked from the LLM")
    seed: int = Field(0, ge=0)


class PromptsBody(Body):
    class_name: Name
    meaning: Name | None = None
    contextual: int = Field(5, ge=0)
    stylized: int = Field(5, ge=0)
    seed: int = Field(0, ge=0)


api = FastAPI(title="ray-synth", summary="What does a class name mean, judged by its images?")


async def check_token(request: Request) -> None:
    """Where a token is set in the environment, require it."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not hmac.compare_digest(given.encode(), token.encode()):
        raise HTTPException(401, "send the header 'Authorization: Bearer TOKEN'")


class BodyLimit:
    """ASGI middleware: 413 for a body over the limit, whether or not it announces its length.

    The limit belongs to the class: Serve copies the FastAPI app before the config is known.
    """

    limit = Limits().max_body_bytes

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.limit:
            return await self._refuse(scope, receive, send, more=True)
        chunks: list[Any] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                chunks.append(message)
                break
            size += len(message.get("body", b""))
            if size > self.limit:
                return await self._refuse(scope, receive, send, message.get("more_body", False))
            chunks.append(message)
            more = message.get("more_body", False)

        async def replay() -> Any:
            return chunks.pop(0) if chunks else await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any, more: bool) -> None:
        # Read on and forget, within reason: a client that is still sending would see a broken
        # connection instead of the answer.
        for _ in range(100_000 if more else 0):
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        text = f"the body is over the limit of {self.limit:,} bytes: send fewer or smaller images"
        await JSONResponse({"detail": text}, 413)(scope, receive, send)


api.add_middleware(BodyLimit)


def _count_words(text: str) -> int:
    """A bound on CLIP's tokens where no image generator is at hand: its marks and 1.4 a word."""
    return 2 + int(1.4 * len(text.replace(",", " , ").split()) + 0.5)


@serve.deployment(name="Disambiguation", max_ongoing_requests=512)
@serve.ingress(api)
class Disambiguation:
    """The ingress: checks input, and composes the LLM and CLIP into meanings and prompts."""

    def __init__(self, config: ServeConfig, llm: DeploymentHandle, clip: DeploymentHandle) -> None:
        self.config, self.llm, self.clip = config, llm, clip
        self.styles = load_styles()
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
        return await self.llm.complete.remote(request)

    async def embed_texts(self, texts: list[str]) -> Any:
        return await self.clip.encode_texts.remote(texts)

    def decode(self, images: list[bytes]) -> list[Any]:
        """RGB pictures. Raises ValueError naming the image that is wrong."""
        decoded = []
        for position, data in enumerate(images):
            try:
                if len(data) > self.config.limits.max_image_bytes:
                    limit = self.config.limits.max_image_bytes
                    raise ValueError(f"{len(data):,} bytes is over the limit of {limit:,}")
                decoded.append(decode_image(data, max_pixels=self.config.limits.max_pixels))
            except ValueError as error:
                raise ValueError(f"images[{position}]: {error}") from None
        return decoded

    async def resolve(
        self,
        class_name: str,
        images: list[bytes],
        *,
        num_meanings: int,
        retries: int = 3,
        seed: int = 0,
        meanings: list[str] | None = None,
    ) -> dict[str, Any]:
        """The class's entry of meanings.json (paper, section 3.1)."""
        pictures = await asyncio.to_thread(self.decode, images)
        features = await self.clip.encode_images.remote(pictures)
        entry = await resolve_meaning(
            class_name,
            image_features=features,
            complete=self.complete,
            embed_texts=self.embed_texts,
            num_meanings=num_meanings,
            retries=retries,
            seed=seed,
            meanings=meanings,
        )
        models = {"llm": self.config.llm.model, "clip": self.config.clip.model}
        return {**entry, **models}

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

    @api.post("/disambiguate", dependencies=[Depends(check_token)])
    async def disambiguate(self, body: DisambiguateBody) -> dict[str, Any]:
        """Which meaning of a class name do these images show?"""
        if len(body.images) > self.config.limits.max_images:
            limit = self.config.limits.max_images
            raise HTTPException(422, f"images: {len(body.images)} given, at most {limit}")
        images = []
        for position, text in enumerate(body.images):
            try:
                payload = text.partition(",")[2] if text.startswith("data:") else text
                images.append(base64.b64decode(payload, validate=True))
            except (binascii.Error, ValueError):
                raise HTTPException(422, f"images[{position}]: not base64") from None
        try:
            return await self.resolve(
                body.class_name,
                images,
                num_meanings=body.num_meanings,
                seed=body.seed,
                meanings=body.meanings,
            )
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    @api.post("/prompts", dependencies=[Depends(check_token)])
    async def prompts(self, body: PromptsBody) -> dict[str, Any]:
        """Contextual and stylized prompts for a class (paper, section 3.2)."""
        total = body.contextual + body.stylized
        if not 1 <= total <= self.config.limits.max_prompts:
            limit = self.config.limits.max_prompts
            raise HTTPException(422, f"{total} prompts asked for; ask for 1 to {limit}")
        meaning = body.meaning or body.class_name
        found = await self.contexts(
            body.class_name, meaning, num_contexts=max(body.contextual, 1), seed=body.seed
        )
        contexts = [Context(**item["context"]) for item in found["contexts"]]
        tokens: dict[str, Any] = {"count_tokens": _count_words, "max_tokens": 77}
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
                for i, style in enumerate(
                    (self.styles * (1 + body.stylized // len(self.styles)))[: body.stylized]
                )
            ],
        }

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """200 once the models are loaded."""
        await asyncio.gather(self.llm.describe.remote(), self.clip.describe.remote())
        return {"status": "ok"}

    @api.get("/models")
    async def models(self) -> dict[str, Any]:
        """The models that answer, and how full their batches were."""
        llm, clip = await asyncio.gather(self.llm.describe.remote(), self.clip.describe.remote())
        return {"llm": llm, "clip": clip}


def build(config: ServeConfig) -> Application:
    """The app of a Serve config or of the pipeline."""
    llm, clip = config.llm, config.clip
    return Disambiguation.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0.1}
    ).bind(
        config,
        LlmDeployment.options(  # type: ignore[attr-defined]
            num_replicas=llm.replicas,
            ray_actor_options={"num_cpus": llm.num_cpus, "num_gpus": llm.num_gpus},
        ).bind(llm),
        ClipDeployment.options(  # type: ignore[attr-defined]
            num_replicas=clip.replicas,
            ray_actor_options={"num_cpus": clip.num_cpus, "num_gpus": clip.num_gpus},
        ).bind(clip),
    )
