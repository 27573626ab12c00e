"""Errors as clients see them: OpenAI's format, as an HTTP answer, a server-sent event or a WebSocket frame."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from django.http import HttpRequest, HttpResponse, HttpResponseBase

from ..errors import MethodNotAllowed, ServingError

logger = logging.getLogger(__name__)

AsyncView = Callable[..., Coroutine[Any, Any, HttpResponseBase]]


def error_body(error: ServingError) -> dict[str, Any]:
    """Return the `error` object."""
    return {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}


def error_bytes(error: ServingError) -> bytes:
    """Return the JSON body of an error answer."""
    return msgspec.json.encode({"error": error_body(error)})


def error_response(error: ServingError) -> HttpResponse:
    """Return the HTTP answer for an error."""
    response = HttpResponse(error_bytes(error), status=error.status, content_type="application/json")
    if error.retry_after_s is not None:
        response["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, MethodNotAllowed):
        response["Allow"] = ", ".join(error.allowed)
    if error.status == 401:
        response["WWW-Authenticate"] = "Session"
    return response


def unexpected(error: Exception) -> ServingError:
    """Log an error that nobody foresaw, without the request's content, and return what the client is told."""
    logger.error("unexpected %s in the API", type(error).__name__, exc_info=error)
    return ServingError("the server made a mistake; it has been logged")


def answers_errors(view: AsyncView) -> AsyncView:
    """Make a view answer with OpenAI's error format whatever is raised in it."""

    @functools.wraps(view)
    async def wrapped(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        try:
            return await view(request, *args, **kwargs)
        except ServingError as error:
            return error_response(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            return error_response(unexpected(error))

    return wrapped
