"""Images from a server that speaks OpenAI's images API: vLLM-Omni, SGLang, a hosted service, our own.

In: plan rows. Out: an image for each, or why the server made none. What cannot be told to every server
(seed, negative prompt, steps, guidance) is sent where it is taken; the first refusal ends that.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import Field

from ray_synth.config import GenerationConfig, Positive, Section, parse_config
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError, first_line
from ray_synth.generators.protocol import Failure, Row, digest_settings, plugin_size
from ray_synth.meaning.openai_llm import limiter

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("ray_synth")
MAX_RETRIES = 5  # times that a busy or broken server is asked again
MOST_BYTES = 64 << 20  # of one encoded image
OPTIONAL = ("response_format", "seed", "negative_prompt", "num_inference_steps", "guidance_scale")
REFUSED_CODES = ("content_policy_violation", "moderation_blocked", "content_filter")


class EndpointSettings(Section):
    """`generation.generator_kwargs` of this generator."""

    base_url: str | None = Field(
        None, description="such as http://localhost:8000/v1; null: OpenAI's"
    )
    api_key_env: str = Field("OPENAI_API_KEY", description="variable that holds the token")
    timeout_s: float = Field(120, gt=0, description="for one image")
    requests_per_minute: Positive | None = Field(None, description="of one generator")
    max_concurrency: Positive = Field(8, description="images in flight, of one generator")
    price_per_image: float = Field(0, ge=0, description="in the currency of your budget")
    budget: float | None = Field(None, ge=0, description="refuse plans that cost more")
    max_images: Positive | None = Field(None, description="refuse plans that ask for more")


class EndpointGenerator:
    """Asks a server for images, several at once.

    Args:
        config: the generation section: `model` is the model's name on the server, `width` x `height`
            the size; `generator_kwargs` as `EndpointSettings`.

    Attributes:
        provenance: what made the images, for their rows; which optional settings were taken.

    Raises:
        UserError: no token for OpenAI's own service.
    """

    def __init__(self, config: GenerationConfig) -> None:
        import openai

        self.settings = _settings(config)
        self.config = config
        self._where = self.settings.base_url or "https://api.openai.com/v1"
        token = os.environ.get(self.settings.api_key_env, "").strip()
        self._client = openai.OpenAI(
            api_key=token or "none",
            base_url=self.settings.base_url,
            timeout=self.settings.timeout_s,
            max_retries=MAX_RETRIES,
        )
        self._threads = ThreadPoolExecutor(self.settings.max_concurrency, "images")
        self._limiter = limiter(self.settings.requests_per_minute)
        self._left_out: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    @property
    def provenance(self) -> dict[str, Any]:
        """Server and model; an image can be made again only where the server keeps the seed."""
        sent = [name for name in OPTIONAL[1:] if name not in self._left_out]
        return {"library": "openai", "server": urlsplit(self._where).netloc.rpartition("@")[2],
                "sent": sent}  # fmt: skip

    def generate(self, rows: list[Row]) -> Sequence[Image.Image | Failure]:
        """One RGB image, or the reason of the server, for each row.

        Raises:
            UserError: the server cannot be reached, or refuses the token, the model or the size.
        """
        return list(self._threads.map(self._ask, rows))

    def _ask(self, row: Row) -> Image.Image | Failure:
        if self._limiter is not None:
            self._limiter.try_acquire("image", blocking=True)
        reply = self._send(row)
        if isinstance(reply, Failure):
            return reply
        if not reply.data or not reply.data[0].b64_json:
            if reply.data and reply.data[0].url:
                raise UserError(
                    f"{self._where} answers with addresses of images, which are not fetched: take a "
                    "server that sends them as b64_json"
                )
            return Failure("the server sent no image")
        return _decoded(reply.data[0].b64_json)

    def _send(self, row: Row) -> Any:
        """The server's reply, or a Failure; an optional setting that it refuses is left out."""
        import openai

        while True:
            left_out = self._left_out
            try:
                return self._client.images.generate(**self._arguments(row, left_out))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if _is_safety(error):
                    return Failure(f"safety checker of the server: {first_line(error)[:200]}")
                named = _refused(error, [n for n in OPTIONAL if n not in left_out])
                if named is None:
                    raise UserError(f"{self._where} refuses the request: {error}") from None
                with self._lock:
                    if named not in self._left_out:
                        log.warning("%s does not take %s; asking without", self._where, named)
                    self._left_out |= {named}
            except openai.OpenAIError as error:
                raise self._explained(error) from None

    def _arguments(self, row: Row, left_out: frozenset[str]) -> dict[str, Any]:
        config = self.config
        width, height = plugin_size(config)
        optional = {
            "seed": int(row["seed"]) % 2**31,
            "negative_prompt": row.get("negative_prompt") or None,
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
        }
        extra = {k: v for k, v in optional.items() if v is not None and k not in left_out}
        arguments = {
            "model": config.model, "prompt": row["prompt"], "n": 1, "size": f"{width}x{height}",
            "extra_body": extra,
        }  # fmt: skip
        if "response_format" not in left_out:
            arguments["response_format"] = "b64_json"
        return arguments

    def _explained(self, error: Exception) -> UserError:
        """What a failure of the server means, and what to do."""
        import openai

        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            fix = f"set the environment variable {self.settings.api_key_env}"
            return UserError(f"the images server {self._where} refuses the token: {fix}")
        if isinstance(error, openai.NotFoundError):
            return UserError(
                f"{self._where} does not know {self.config.model!r}, or has no images API: {error}"
            )
        if isinstance(error, openai.APIConnectionError):
            return UserError(
                f"the images server {self._where} cannot be reached ({error}): check "
                "generation.generator_kwargs.base_url, and that the server is up"
            )
        code = getattr(error, "status_code", type(error).__name__)  # still, after MAX_RETRIES
        return UserError(
            f"the images server {self._where} fails ({code}: {first_line(error)}): run the same "
            "command again later, or see generation.generator_kwargs.requests_per_minute"
        )

    @staticmethod
    def check(config: GenerationConfig) -> None:
        """Raises UserError for a wrong setting, or a token that is missing."""
        settings = _settings(config)
        if config.model == "embedded" and settings.base_url is None:
            raise UserError(
                "generator 'endpoint' needs generation.model, the model's name on the server, and "
                "generation.generator_kwargs.base_url, the server's address"
            )
        if config.reference is not None:
            raise UserError(
                "generator 'endpoint' takes no real images: leave generation.reference out"
            )
        if settings.base_url is None and not os.environ.get(settings.api_key_env, "").strip():
            raise UserError(
                f"no token for the images of {config.model!r}: set the environment variable "
                f"{settings.api_key_env}, or generator_kwargs.base_url for a server of your own"
            )

    @staticmethod
    def check_plan(config: GenerationConfig, num_images: int) -> None:
        """Raises UserError where a plan of so many images is over the budget."""
        settings = _settings(config)
        tries = 3 if config.checks.policy == "retry" else 1
        most = num_images * tries
        cost = most * settings.price_per_image
        how = f"{num_images:,} images" + (f" with up to {tries} tries each" if tries > 1 else "")
        if settings.max_images is not None and most > settings.max_images:
            raise UserError(
                f"the plan has {how}, and generator_kwargs.max_images is {settings.max_images:,}: "
                "lower prompting.multiplier, or raise it"
            )
        if settings.budget is not None and cost > settings.budget:
            raise UserError(
                f"the plan has {how} at {settings.price_per_image:g}, {cost:,.2f} in all, and "
                f"generator_kwargs.budget is {settings.budget:g}: lower prompting.multiplier, or "
                "raise it"
            )

    @staticmethod
    def filled(config: GenerationConfig) -> GenerationConfig:
        """The config with a size; steps and guidance stay the server's where they are not given."""
        width, height = plugin_size(config)
        return config.model_copy(update={"width": width, "height": height})

    @staticmethod
    def fingerprint(config: GenerationConfig) -> str:
        """Of all that decides the pixels besides the row; the server's address does not."""
        values = [config.model, config.width, config.height, config.num_inference_steps]
        return digest_settings(
            ["endpoint", *values, config.guidance_scale, *config.encoding.values()]
        )


def _decoded(text: str) -> Image.Image | Failure:
    if len(text) > MOST_BYTES * 4 // 3:
        return Failure(f"the server sent more than {MOST_BYTES >> 20} MB for one image")
    try:
        return decode_image(base64.b64decode(text, validate=True))
    except (binascii.Error, UserError) as error:
        return Failure(f"the server sent no readable image: {first_line(error)}")


def _is_safety(error: Any) -> bool:
    code = str(getattr(error, "code", "") or "")
    return code in REFUSED_CODES or "safety system" in str(error)


def _refused(error: Any, sent: list[str]) -> str | None:
    """Which of the optional settings a 400 or 422 is about."""
    if getattr(error, "param", None) in sent:
        return str(error.param)
    return next((name for name in sent if name in str(error)), None)


def _settings(config: GenerationConfig) -> EndpointSettings:
    return parse_config(
        config.generator_kwargs, origin="generation.generator_kwargs", model=EndpointSettings
    )
