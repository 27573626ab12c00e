"""GET /health, whether this process is up, and GET /ready, whether a model can answer."""

from __future__ import annotations

import msgspec
from django.http import HttpRequest, HttpResponse
from django.views.decorators.csrf import csrf_exempt

from ..errors import MethodNotAllowed, ServingError, UnknownPath
from ..fleet.registry import registry
from .errors import answers_errors


@csrf_exempt
@answers_errors
async def health(request: HttpRequest) -> HttpResponse:
    """Answer 200: the process takes requests. Looks at nothing else, so that it never restarts for another's fault."""
    if request.method not in ("GET", "HEAD"):
        raise MethodNotAllowed("GET", "HEAD")
    return HttpResponse(b'{"status":"ok"}', content_type="application/json")


@csrf_exempt
@answers_errors
async def ready(request: HttpRequest) -> HttpResponse:
    """Answer 200 when at least one model has a ready worker, else 503, with the state of each model."""
    if request.method not in ("GET", "HEAD"):
        raise MethodNotAllowed("GET", "HEAD")
    try:
        models = await registry.models()
    except ServingError:
        models = {}
    states = {
        name: "ready"
        if any(w.state == "ready" for w in model.workers)
        else next((w.state for w in model.workers), "no worker")
        for name, model in models.items()
        if model.wanted
    }
    is_ready = "ready" in states.values()
    body = msgspec.json.encode({"status": "ready" if is_ready else "not ready", "models": states})
    return HttpResponse(body, status=200 if is_ready else 503, content_type="application/json")


@csrf_exempt
@answers_errors
async def unknown_path(request: HttpRequest) -> HttpResponse:
    """Answer 404 in the API's format for whatever else is asked for under /v1/."""
    raise UnknownPath(f"there is no endpoint {request.path}")
