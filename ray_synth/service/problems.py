"""Errors as application/problem+json (RFC 9457): what is wrong, how to fix it, which request."""

from __future__ import annotations

import http
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ray_synth.service.messages import Problem
from ray_synth.service.request_ids import is_id
from ray_synth.storage.secrets import redact

MEDIA_TYPE = "application/problem+json"
logger = logging.getLogger("ray.serve")  # Serve adds the request id to each of its lines


def problem(status: int, detail: str) -> Problem:
    """The problem with the title of its status and the id of the request in work."""
    title = http.HTTPStatus(status).phrase
    return Problem(title=title, status=status, detail=redact(detail), request_id=_request_id())


def problem_response(
    status: int, detail: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The problem as a response."""
    body = problem(status, detail).model_dump(exclude_none=True)
    return JSONResponse(body, status, headers, media_type=MEDIA_TYPE)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These errors, for an operation's OpenAPI."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": http.HTTPStatus(status).phrase,
            "model": Problem,
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status in statuses
    }


def install_handlers(api: FastAPI) -> None:
    """Answer every error of the app with a problem; what went wrong inside goes to the log alone."""

    @api.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return problem_response(error.status_code, str(error.detail), dict(error.headers or {}))

    @api.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(422, "; ".join(_say(item) for item in error.errors()[:10]))

    @api.exception_handler(Exception)
    async def _broken(_: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed: %s", type(error).__name__, exc_info=error)
        return problem_response(500, "the service failed on this request; its log says why")


def _say(item: Any) -> str:
    """One of pydantic's errors: where, and what. The value itself is not sent back."""
    where = ".".join(str(part) for part in item["loc"][1:])
    text = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _request_id() -> str | None:
    from ray.serve.context import _get_serve_request_context

    given = _get_serve_request_context().request_id
    return given if is_id(given) else None
