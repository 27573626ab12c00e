"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

import msgspec
from django.http import HttpRequest, HttpResponse
from django.views.decorators.csrf import csrf_exempt

from ..errors import MethodNotAllowed, ModelNotFound
from ..fleet.registry import ModelView, registry
from .auth import client_of
from .errors import answers_errors


def model_object(model: ModelView) -> dict[str, Any]:
    """Return a model in OpenAI's format, with its context length and whether it can answer now."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "mlx-serving",
        "context_length": model.context_length,
        "ready": any(worker.state == "ready" for worker in model.workers),
    }


def _json(value: Any) -> HttpResponse:
    return HttpResponse(msgspec.json.encode(value), content_type="application/json")


@csrf_exempt
@answers_errors
async def list_models(request: HttpRequest) -> HttpResponse:
    """List the models that are switched on."""
    if request.method not in ("GET", "HEAD"):
        raise MethodNotAllowed("GET", "HEAD")
    await client_of(request)
    models = await registry.models()
    return _json({"object": "list", "data": [model_object(m) for m in models.values() if m.wanted]})


@csrf_exempt
@answers_errors
async def retrieve_model(request: HttpRequest, name: str) -> HttpResponse:
    """Describe one model."""
    if request.method not in ("GET", "HEAD"):
        raise MethodNotAllowed("GET", "HEAD")
    await client_of(request)
    model = (await registry.models()).get(name)
    if model is None:
        raise ModelNotFound(f"the model {name!r} does not exist here", param="model")
    return _json(model_object(model))
