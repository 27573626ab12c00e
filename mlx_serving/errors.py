"""The one tree of errors. Each has a stable code; the edge (`api/`) turns it into HTTP, SSE or WebSocket.

Raised by the gateway and the API's parsers; a worker's `Failed` event becomes one through `from_failure`.
"""

from __future__ import annotations

from inference.protocol import Failed


class ServingError(Exception):
    """Base of all errors that a client may see.

    Attributes:
        code: stable, machine-readable name.
        status: HTTP status.
        kind: OpenAI's error `type`.
        param: the request's field at fault, or None.
        retry_after_s: what to tell the client to wait, or None.
    """

    code = "internal_error"
    status = 500
    kind = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(ServingError):
    """The client's request cannot be served as it is; the message says why."""

    code = "invalid_request"
    status = 400
    kind = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    """A parameter, or this value of it, is known but not offered."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"


class BodyTooLarge(InvalidRequest):
    """The request's body is longer than MAX_BODY_BYTES."""

    code = "request_too_large"
    status = 413


class AuthenticationRequired(ServingError):
    """The site is closed to anonymous clients."""

    code = "authentication_required"
    status = 401
    kind = "authentication_error"


class PermissionRefused(ServingError):
    """The client is known but may not do this, or the CSRF check failed."""

    code = "permission_denied"
    status = 403
    kind = "permission_error"


class ModelNotFound(InvalidRequest):
    """No model of this name is served."""

    code = "model_not_found"
    status = 404


class UnknownPath(InvalidRequest):
    """There is no such endpoint."""

    code = "not_found"
    status = 404


class MethodNotAllowed(InvalidRequest):
    """The path exists, but not with this HTTP method.

    Attributes:
        allowed: the methods that it has.
    """

    code = "method_not_allowed"
    status = 405

    def __init__(self, *allowed: str) -> None:
        super().__init__(f"use {' or '.join(allowed)}")
        self.allowed = allowed


class Overloaded(ServingError):
    """A bounded queue is full: here, for this client, or in the worker."""

    code = "overloaded"
    status = 429
    kind = "rate_limit_error"


class ModelNotReady(ServingError):
    """The model is known, but no worker can answer for it at this moment."""

    code = "model_not_ready"
    status = 503


class WorkerLost(ServingError):
    """The worker died, or the connection to it broke, before the request had ended."""

    code = "worker_lost"
    status = 502


class WorkerDraining(ServingError):
    """The worker was stopped before the request had ended."""

    code = "worker_draining"
    status = 503


class SlowReader(ServingError):
    """The client read so slowly that its buffer overflowed."""

    code = "slow_reader"
    status = 408


class RequestTimeout(ServingError):
    """The request took longer than REQUEST_TIMEOUT_S."""

    code = "request_timeout"
    status = 504


class EngineError(ServingError):
    """The engine failed on this request."""

    code = "engine_error"
    status = 500


_BY_FAILURE: dict[str, type[ServingError]] = {
    "invalid_request": InvalidRequest,
    "context_length_exceeded": ContextLengthExceeded,
    "overloaded": Overloaded,
    "worker_draining": WorkerDraining,
    "worker_lost": WorkerLost,
    "worker_not_ready": ModelNotReady,
    "slow_reader": SlowReader,
    "request_timeout": RequestTimeout,
    "engine_error": EngineError,
}


def from_failure(failed: Failed, retry_after_s: int) -> ServingError:
    """Return the error for a worker's Failed event; retryable ones tell the client when to come again."""
    return _BY_FAILURE[failed.code](
        failed.message,
        param=failed.param,
        retry_after_s=retry_after_s if failed.retryable else None,
    )
