"""The page of the worker processes: to look at, not to change. The supervisor alone writes them."""

from __future__ import annotations

import json
from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.text import Truncator
from django.utils.translation import gettext_lazy as _

from ..models import Worker
from .display import NOTHING, human_age, human_bytes, worker_badge


@admin.register(Worker)
class WorkerAdmin(admin.ModelAdmin):
    """Worker processes, the newest first."""

    list_display = (
        "id",
        "model",
        "badge",
        "host",
        "pid",
        "requests",
        "kv",
        "memory",
        "step",
        "heartbeat",
        "short_error",
    )
    list_filter = ("state", "model", "host")
    list_select_related = ("model",)
    search_fields = ("id", "model__name", "host")
    change_list_template = "admin/mlx_serving/live_list.html"
    fieldsets = (
        (None, {"fields": ("id", "model", "badge", "last_error")}),
        (_("Process"), {"fields": ("host", "pid", "endpoint", "started_at", "heartbeat", "stopped_at")}),
        (_("Load"), {"fields": ("requests", "kv", "memory", "step")}),
        (_("Details"), {"fields": ("information", "counters")}),
    )

    class Media:
        """Style."""

        css = {"all": ("mlx_serving/admin/admin.css",)}

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody: a worker is a process."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Worker | None = None) -> bool:
        """Nobody: a row is what was seen."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Worker | None = None) -> bool:
        """Nobody: the supervisor forgets old workers by itself."""
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Worker | None = None) -> list[Any]:
        """Return every field that the page shows."""
        return [name for _title, options in self.fieldsets for name in options["fields"]]

    @admin.display(description=_("state"), ordering="state")
    def badge(self, worker: Worker) -> SafeString:
        """Show the state."""
        return worker_badge(worker, timezone.now())

    @admin.display(description=_("running / waiting"), ordering="running")
    def requests(self, worker: Worker) -> str:
        """Show the requests."""
        return f"{worker.running} / {worker.waiting}"

    @admin.display(description=_("KV cache"), ordering="kv_bytes")
    def kv(self, worker: Worker) -> str:
        """Show the size of the KV cache."""
        return human_bytes(worker.kv_bytes)

    @admin.display(description=_("memory"), ordering="memory_bytes")
    def memory(self, worker: Worker) -> str:
        """Show the memory that mlx holds."""
        return human_bytes(worker.memory_bytes)

    @admin.display(description=_("step time"), ordering="step_ms")
    def step(self, worker: Worker) -> str:
        """Show the moving average of a decode step."""
        return f"{worker.step_ms:.1f} ms" if worker.step_ms else NOTHING

    @admin.display(description=_("last heartbeat"), ordering="heartbeat_at")
    def heartbeat(self, worker: Worker) -> str:
        """Show when the supervisor last had an answer."""
        return human_age(worker.heartbeat_at, timezone.now())

    @admin.display(description=_("last error"))
    def short_error(self, worker: Worker) -> str:
        """Show the beginning of the last error."""
        return Truncator(worker.last_error).chars(120) or NOTHING

    @admin.display(description=_("model information"))
    def information(self, worker: Worker) -> str:
        """Show what the worker knows of its model."""
        return _as_text(worker.info)

    @admin.display(description=_("load and counters"))
    def counters(self, worker: Worker) -> str:
        """Show what the worker was last busy with, and what it has counted."""
        return _as_text(worker.load)


def _as_text(values: dict[str, Any]) -> str:
    if not values:
        return NOTHING
    return format_html('<pre class="mlx-info">{}</pre>', json.dumps(values, indent=2, sort_keys=True))
