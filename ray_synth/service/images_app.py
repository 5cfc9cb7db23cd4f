"""A generator behind OpenAI's images API: any client of that interface can ask it for pictures.

    ray-synth serve images --config my.yaml
    curl localhost:8001/v1/images/generations -H 'content-type: application/json' -d '{"prompt": ...}'

Requests share the model's batches; an image depends on its own prompt and seed, whoever asks beside it.
"""

# No postponed annotations here: FastAPI could not resolve those of the closures then.
import asyncio
import base64
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from ray_synth.config import GenerationConfig, Replicas, Section
from ray_synth.data.images import encode_image
from ray_synth.errors import UserError
from ray_synth.generators.protocol import generate_all, plugin_size
from ray_synth.generators.registry import filled, generator_class
from ray_synth.service.full_batches import FullBatches
from ray_synth.service.gate import Gate
from ray_synth.service.limits import Limits
from ray_synth.service.replicas import replica_options
from ray_synth.storage.secrets import redact

MOST_WAITING = 512  # requests; beyond: 503, come again
LIMITS = Limits(max_body_bytes=1_000_000, max_queued_requests=MOST_WAITING)  # prompts are small
INGRESS_CPUS = 0.1
Paint = Callable[[list[dict[str, Any]]], Awaitable[list[tuple[bytes, str]]]]


class ImagesConfig(Section):
    """Arguments of the app (`args:` in a Serve config)."""

    generation: GenerationConfig = GenerationConfig()
    replicas: Replicas = 1
    timeout_s: float = Field(300, gt=0, description="for one request")


class ImagesBody(BaseModel):
    """What OpenAI's `images/generations` takes, and what diffusion servers take besides."""

    prompt: str = Field(min_length=1, max_length=4000)
    model: str | None = Field(None, max_length=500)
    n: int = Field(1, ge=1, le=16)
    size: str | None = Field(None, pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    response_format: str = Field("b64_json", max_length=20)
    user: str | None = Field(None, max_length=500)
    seed: int | None = Field(None, ge=0, lt=2**48)
    negative_prompt: str = Field("", max_length=4000)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None


class Refused(Exception):
    """A request that cannot be answered; in OpenAI's words."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = "") -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or None


def images_api(config: GenerationConfig, paint: Paint, *, timeout_s: float = 300) -> FastAPI:
    """The HTTP interface of a generator.

    Args:
        config: the generation section with all settings filled in.
        paint: plan rows (`prompt`, `negative_prompt`, `seed`) -> for each the encoded PNG, or b"" and
            why there is none.
    """
    api = FastAPI(title="ray-synth images", docs_url=None, redoc_url=None)
    api.add_middleware(Gate)
    _install_handlers(api)

    @api.post("/v1/images/generations")
    async def generations(body: ImagesBody) -> dict[str, Any]:
        _check(body, config)
        first = secrets.randbelow(2**47) if body.seed is None else body.seed
        rows = [
            {"prompt": body.prompt, "negative_prompt": body.negative_prompt, "seed": first + turn,
             "class_name": "", "meaning": "", "sample_id": str(turn)}
            for turn in range(body.n)
        ]  # fmt: skip
        try:
            async with asyncio.timeout(timeout_s):
                made = await paint(rows)
        except TimeoutError:
            raise Refused(504, f"no image within {timeout_s:g} s: ask again later") from None
        for data, reason in made:
            if not data:
                code = "content_policy_violation" if "safety checker" in reason else "no_image"
                raise Refused(400, reason, code=code)
        found = [{"b64_json": base64.b64encode(image).decode()} for image, _ in made]
        return {"created": int(time.time()), "data": found, "seed": first}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": config.model, "object": "model"}]}

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return api


def _check(body: ImagesBody, config: GenerationConfig) -> None:
    """Raises Refused, naming the parameter, for what this model does not do."""
    if body.model not in (None, config.model):
        raise Refused(404, f"the model here is {config.model!r}", "model", "model_not_found")
    if body.response_format != "b64_json":
        raise Refused(400, "images are sent as b64_json alone", "response_format")
    width, height = plugin_size(config)
    if body.size not in (None, "auto", f"{width}x{height}"):
        raise Refused(400, f"the size here is {width}x{height}", "size")
    for name in ("num_inference_steps", "guidance_scale"):
        given = getattr(body, name)
        if given is not None and given != getattr(config, name):
            raise Refused(400, f"{name} is {getattr(config, name)} here", name)


def _install_handlers(api: FastAPI) -> None:
    def answer(
        status: int, message: str, param: str | None = None, code: str | None = None
    ) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": redact(message), "type": kind, "param": param, "code": code}
        return JSONResponse({"error": error}, status)

    @api.exception_handler(Refused)
    async def _refused(_: Request, error: Refused) -> JSONResponse:
        return answer(error.status, str(error), error.param, error.code)

    @api.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:]))
        return answer(400, f"{param or 'the body'}: {first['msg']}", param or None)

    @api.exception_handler(Exception)
    async def _broken(_: Request, error: Exception) -> JSONResponse:
        return answer(500, "the service failed on this request; its log says why")


class Painter:
    """A loaded generator; requests that come together share its batches."""

    def __init__(self, config: GenerationConfig) -> None:
        self.generator = generator_class(config.generator)(config)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="generator")
        size = 16 if config.batch_size == "auto" else config.batch_size
        self.batches = FullBatches(self._together, max_size=size, size=len)

    async def __call__(self, rows: list[dict[str, Any]]) -> list[tuple[bytes, str]]:
        """The encoded PNG of each row, or b"" and why there is none."""
        return await self.batches(rows)

    async def _together(self, requests: list[list[dict[str, Any]]]) -> list[Any]:
        rows = [row for request in requests for row in request]
        loop = asyncio.get_running_loop()
        made = iter(await loop.run_in_executor(self.thread, self._paint, rows))
        return [[next(made) for _ in request] for request in requests]

    def _paint(self, rows: list[dict[str, Any]]) -> list[tuple[bytes, str]]:
        try:
            results = generate_all(self.generator, rows)
        except (RuntimeError, UserError) as error:  # it fails on every row
            return [(b"", str(error))] * len(rows)
        return [(encode_image(image) if image else b"", str(why)) for image, why in results]


@serve.deployment(name="Painter", max_ongoing_requests=MOST_WAITING)
class PainterDeployment(Painter):
    """A painter on the cluster."""


async def _on_cluster(rows: list[dict[str, Any]]) -> list[tuple[bytes, str]]:
    """Asks the painters of the app that this replica belongs to."""
    app = serve.get_replica_context().app_name
    return await serve.get_deployment_handle("Painter", app).remote(rows)


def build(config: ImagesConfig) -> Application:
    """The app of a Serve config: an ingress without a model before painters that have one."""
    generation = filled(config.generation)

    @serve.deployment(name="Images", max_ongoing_requests=MOST_WAITING)
    @serve.ingress(images_api(generation, _on_cluster, timeout_s=config.timeout_s))
    class Images:
        def __init__(self, painters: DeploymentHandle) -> None:
            self.painters = painters  # of one app with this
            Gate.open_with(LIMITS)

    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": generation.num_cpus, "num_gpus": generation.num_gpus},
        **replica_options(config.replicas, {}, busy=2),
    }
    painters: Any = PainterDeployment.options(**options)  # type: ignore[attr-defined]
    ingress: Any = Images.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": INGRESS_CPUS}
    )
    return ingress.bind(painters.bind(generation))


__all__ = ["ImagesConfig", "build", "images_api"]
