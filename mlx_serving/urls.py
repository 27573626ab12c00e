"""The HTTP endpoints, to be included at the root of a site's URLs."""

from __future__ import annotations

from django.urls import path, re_path
from django_prometheus.exports import ExportToDjangoView

from .api.chat import chat_completions
from .api.completions import completions
from .api.health import health, ready, unknown_path
from .api.model_list import list_models, retrieve_model

app_name = "mlx_serving"

urlpatterns = [
    path("v1/chat/completions", chat_completions, name="chat-completions"),
    path("v1/completions", completions, name="completions"),
    path("v1/models", list_models, name="models"),
    path("v1/models/<path:name>", retrieve_model, name="model"),
    re_path(r"^v1/", unknown_path),
    path("health", health, name="health"),
    path("ready", ready, name="ready"),
    path("metrics", ExportToDjangoView, name="metrics"),
]
