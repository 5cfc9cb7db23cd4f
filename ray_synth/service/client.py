"""A Python client of the disambiguation service: class names and images in, typed answers out.

with Client("http://localhost:8000") as client:
    answer = client.disambiguate("crane", [Path("a.jpg")], context="from a list of birds")
    print(answer.choice, answer.confidence)
"""

from __future__ import annotations

import base64
import email.utils
import io
import json
import logging
import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageOps
from pydantic import TypeAdapter, ValidationError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from ray_synth.errors import UserError
from ray_synth.service.messages import (
    Answer,
    LimitsAnswer,
    Line,
    ModelsAnswer,
    Problem,
    PromptsAnswer,
)

TOKEN_VARIABLE = "RAY_SYNTH_SERVE_TOKEN"
BROKEN = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)
AGAIN = frozenset({500, 502, 503, 504})
CONNECT_S = 10.0
PNG_MODES = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})

ImageLike = bytes | Path | str | Image.Image
logger = logging.getLogger(__name__)
_backoff = wait_exponential(0.5, max=20) + wait_random(0, 0.5)


class ServiceError(UserError):
    """The service answered with a problem: a question that it refuses, or a fault of its own."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)  # whole, so that the error can be pickled: Ray's tasks raise it
        self.problem = problem

    def __str__(self) -> str:
        request = f" (request {self.problem.request_id})" if self.problem.request_id else ""
        return f"{self.problem.title}: {self.problem.detail}{request}"


class ServiceUnavailable(ConnectionError):
    """The service never answered: nothing listens, the connection broke, or time ran out.

    No `ServiceError`, because no problem was told; code that knows `ConnectionError` knows this.
    """


class Client:
    """A client of one service; threads may share it.

    The service's answers depend on the question alone, so a question is asked again where the
    connection breaks or the service answers 500, 502, 503 or 504: after waits that double, or as
    long as its `Retry-After` says. An error of the caller's (4xx) is raised at once.

    Args:
        url: where the service is, with the route prefix if it has one.
        token: the service's token; default: the environment variable `RAY_SYNTH_SERVE_TOKEN`.
        timeout_s: seconds without a byte until a question is given up; it is not asked again then.
        retries: times that a question is asked again.

    Raises:
        UserError: `url` is not an http(s) URL.
    """

    def __init__(
        self,
        url: str = "http://localhost:8000",
        *,
        token: str | None = None,
        timeout_s: float = 150,
        retries: int = 5,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url!r} is not the URL of a service: give http://HOST:PORT")
        self.url, self.timeout_s, self.retries = url.rstrip("/"), timeout_s, retries
        self.retried = 0  # questions asked again so far, over all threads
        self._lock = threading.Lock()
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        token = token and token.strip()
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s)),
                # a load test's threads each have a connection, and none waits for another's
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
            )
        except httpx.InvalidURL as error:
            raise UserError(f"{url!r} is not the URL of a service: {error}") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def disambiguate(
        self,
        class_name: str,
        images: Sequence[ImageLike] = (),
        *,
        context: str | None = None,
        meanings: Sequence[str] | None = None,
        num_meanings: int = 5,
        seed: int = 0,
    ) -> Answer:
        """Which meaning of a class name do these images show, or does this context speak of?

        Args:
            images: each the bytes of an image file, a path, a PIL image (sent as PNG), or a str:
                an https:// URL of a host that the service allows, or else a path.
            context: what the class is of, as in "from a list of birds".
            meanings: candidates beside the language model's.
            num_meanings: candidates asked from the language model; 0: none.

        Raises:
            ServiceError: the service refuses the question, or fails on it again and again.
            ServiceUnavailable: it cannot be reached, or does not answer in time.
            OSError: an image's path cannot be read.
        """
        body = {
            **_question(class_name, images),
            "meanings": None if meanings is None else list(meanings),
            "context": context,
            "num_meanings": num_meanings,
            "seed": seed,
        }
        return _read(Answer, self._ask("POST", "/disambiguate", body))

    def disambiguate_batch(
        self,
        classes: Mapping[str, Sequence[ImageLike]],
        *,
        context: str | None = None,
        num_meanings: int = 5,
        seed: int = 0,
    ) -> Iterator[Line]:
        """A whole class list: each class's answer, or its problem, as it comes.

        Images are read at once; the service is asked as the first line is taken. Where the stream
        breaks, the whole list is asked about again, since the classes of a list inform each other, and
        the lines that came before are passed over.

        Raises:
            ServiceError, ServiceUnavailable, OSError: as `disambiguate`, for the list as a whole.
        """
        waiting = {name.strip(): _question(name, images) for name, images in classes.items()}
        if len(waiting) < len(classes):
            raise UserError("classes: give each class name once")
        asking = {"context": context, "num_meanings": num_meanings, "seed": seed}
        return self._lines(waiting, asking)

    def prompts(
        self,
        class_name: str,
        *,
        meaning: str | None = None,
        contextual: int = 5,
        stylized: int = 5,
        seed: int = 0,
    ) -> PromptsAnswer:
        """Prompts for a class. Raises ServiceError or ServiceUnavailable, as `disambiguate`."""
        body = {"class_name": class_name, "meaning": meaning, "seed": seed}
        body |= {"contextual": contextual, "stylized": stylized}
        return _read(PromptsAnswer, self._ask("POST", "/prompts", body))

    def models(self) -> ModelsAnswer:
        """The models that answer, and how full their batches were; raises as `disambiguate`."""
        return _read(ModelsAnswer, self._ask("GET", "/models"))

    def limits(self) -> LimitsAnswer:
        """What one request may bring; raises as `disambiguate`."""
        return _read(LimitsAnswer, self._ask("GET", "/limits"))

    def is_ready(self) -> bool:
        """Whether the service and its models answer now; asks once, and never raises."""
        try:
            return self._http.get("/readyz", timeout=min(15, self.timeout_s)).status_code == 200
        except httpx.RequestError:
            return False

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        def once() -> httpx.Response:
            return self._http.request(method, path, json=body).raise_for_status()

        with self._own_errors():
            return self._retrying()(once)

    def _lines(self, waiting: dict[str, Any], asking: dict[str, Any]) -> Iterator[Line]:
        """The lines of `waiting`'s classes, each once, over as many streams as it takes."""
        stream: Generator[Line, None, None] | None = None
        body = {"classes": list(waiting.values()), **asking}

        def next_line() -> Line:
            nonlocal stream
            stream = stream or self._stream(body)
            try:
                return next(stream)
            except httpx.HTTPError:
                stream = None
                raise

        try:
            while waiting:
                with self._own_errors():
                    line = self._retrying()(next_line)
                if waiting.pop(line.class_name, None):
                    yield line
        finally:
            if stream is not None:
                stream.close()

    def _stream(self, body: dict[str, Any]) -> Generator[Line, None, None]:
        """One stream's lines; ends with RemoteProtocolError: who has all lines asks no more."""
        with self._http.stream("POST", "/disambiguate/batch", json=body) as response:
            if not response.is_success:
                response.read()
            for text in filter(str.strip, response.raise_for_status().iter_lines()):
                try:
                    values = json.loads(text)
                except ValueError:
                    raise httpx.RemoteProtocolError("the stream ended within a line") from None
                yield _valid(Line, values, response)
        raise httpx.RemoteProtocolError("the stream ended before all classes had come")

    def _retrying(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception(self._is_worth_asking_again),
            stop=stop_after_attempt(1 + self.retries),
            wait=lambda state: max(_backoff(state), _retry_after(_error(state))),
            before_sleep=self._count,
            reraise=True,
        )

    def _is_worth_asking_again(self, error: BaseException) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            # a service may ask to be left alone for longer than a question may take
            soon = _retry_after(error) <= self.timeout_s
            return error.response.status_code in AGAIN and soon
        return isinstance(error, BROKEN)

    def _count(self, state: RetryCallState) -> None:
        with self._lock:
            self.retried += 1
        wait = state.next_action.sleep if state.next_action else 0
        logger.info("%s: asking again in %.1f s: %s", self.url, wait, _error(state))

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """httpx's errors as this module's."""
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise ServiceError(_problem(error.response)) from None
        except httpx.TimeoutException as error:
            said = f"{type(error).__name__}; timeout_s is {self.timeout_s:g}"
            raise ServiceUnavailable(f"{self.url} did not answer in time ({said})") from error
        except httpx.RequestError as error:
            raise ServiceUnavailable(f"{self.url} cannot be reached: {error}") from error


def encode_image(image: ImageLike) -> str:
    """An image as the service takes it: base64 of an image file, or an https URL as it is.

    Raises:
        OSError: a path cannot be read.
        UserError: a URL that is not https.
        TypeError: something else than bytes, a path, a PIL image or a str.
    """
    if isinstance(image, str):
        if image.startswith("https://"):
            return image
        if image.startswith(("http://", "data:", "file:")):
            raise UserError(f"not an https:// URL or a path: {image[:40]!r}")
        image = Path(image)
    if isinstance(image, Path):
        image = image.read_bytes()
    elif isinstance(image, Image.Image):
        buffer = io.BytesIO()
        upright = ImageOps.exif_transpose(image)
        picture = upright if upright.mode in PNG_MODES else upright.convert("RGB")
        picture.save(buffer, "PNG", compress_level=3)
        image = buffer.getvalue()
    if not isinstance(image, bytes):
        raise TypeError(f"an image is bytes, a path, a PIL image or a str, not {type(image)}")
    return base64.b64encode(image).decode()


def _question(class_name: str, images: Sequence[ImageLike]) -> dict[str, Any]:
    if isinstance(images, (str, bytes)):
        raise TypeError("images is a list of images, also where there is one")
    return {"class_name": class_name, "images": [encode_image(image) for image in images]}


def _read(model: Any, response: httpx.Response) -> Any:
    try:
        values = response.json()
    except ValueError:
        values = None
    return _valid(model, values, response)


def _valid(model: Any, values: Any, response: httpx.Response) -> Any:
    """`values` as `model`; ServiceError for another version's answer, or another service's."""
    try:
        return TypeAdapter(model).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        title = "Not an answer that this client knows"
        raise ServiceError(_made_up(response, title, f"{where}: {first['msg']}")) from None


def _problem(response: httpx.Response) -> Problem:
    """What the service says is wrong; made up from the status where a gateway says it."""
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        text = " ".join(response.text.split())[:300] or "the answer says nothing more"
        return _made_up(response, response.reason_phrase or "Error", text)


def _made_up(response: httpx.Response, title: str, detail: str) -> Problem:
    seen = {"status": response.status_code, "request_id": response.headers.get("x-request-id")}
    return Problem(title=title, detail=detail, **seen)


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _retry_after(error: BaseException | None) -> float:
    """Seconds that the answer's `Retry-After` asks for: a number of them, or a date; else 0."""
    if not isinstance(error, httpx.HTTPStatusError):
        return 0.0
    text = error.response.headers.get("retry-after", "").strip()
    try:
        if text.isdigit():
            return float(text)
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return 0.0
