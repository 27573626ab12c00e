"""The page of the models: add one, see how its workers are, load, unload and reload it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.db.models import Prefetch, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.text import Truncator
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext
from django.views.decorators.http import require_POST

from ..fleet import lifecycle
from ..models import ServedModel, Worker
from .display import NOTHING, badge, human_bytes, telling, worker_badge

_NEWEST = 8
"""Workers of a model that are read for its row in the list."""


@dataclass(frozen=True, slots=True)
class Command:
    """Something that can be asked of models."""

    name: str
    run: Callable[[QuerySet[ServedModel]], int]
    label: Any
    logged: str
    """How the object's history has it."""

    def done(self, changed: int) -> str:
        """Return what to tell the user."""
        if not changed:
            return _("Nothing to do.")
        texts = {
            "load": ngettext("%d model will be loaded.", "%d models will be loaded.", changed),
            "unload": ngettext("%d model will be unloaded.", "%d models will be unloaded.", changed),
            "reload": ngettext(
                "%d model gets a fresh worker; the old one serves until that is ready.",
                "%d models get fresh workers; the old ones serve until those are ready.",
                changed,
            ),
        }
        return texts[self.name] % changed


COMMANDS = {
    command.name: command
    for command in (
        Command("load", lifecycle.load, gettext_lazy("Load"), "Asked to load."),
        Command("unload", lifecycle.unload, gettext_lazy("Unload"), "Asked to unload."),
        Command("reload", lifecycle.reload, gettext_lazy("Reload"), "Asked to reload."),
    )
}


class ServedModelForm(forms.ModelForm):
    """A model's fields. A name that is left empty comes from the source."""

    class Meta:
        """The fields that a person decides."""

        model = ServedModel
        fields = ("source", "name", "revision", "wanted", "dtype", "context_length", "max_rows")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "name" in self.fields:
            self.fields["name"].required = False
            self.fields["name"].help_text = _("The name that clients use; left empty, it is taken from the source.")

    def clean_source(self) -> str:
        """Refuse what cannot be a source."""
        source: str = self.cleaned_data["source"]
        if problem := lifecycle.source_problem(source):
            raise forms.ValidationError(problem)
        return source

    def clean(self) -> dict[str, Any]:
        """Fill in the name. The model's own validation comes after this and sees it."""
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        if not cleaned.get("name") and cleaned.get("source") and "name" not in self.errors:
            cleaned["name"] = lifecycle.suggest_name(cleaned["source"])
        return cleaned


@admin.register(ServedModel)
class ServedModelAdmin(admin.ModelAdmin):
    """Models and the state of their workers."""

    form = ServedModelForm
    list_display = ("name", "state", "requests", "memory", "last_error", "source")
    list_filter = ("wanted",)
    search_fields = ("name", "source")
    fieldsets = (
        (
            gettext_lazy("State"),
            {"fields": ("state", "requests", "memory", "last_error", "created_at", "updated_at")},
        ),
        (None, {"fields": ("source", "name", "wanted")}),
        (gettext_lazy("Options"), {"fields": ("revision", "dtype", "context_length", "max_rows")}),
    )
    readonly_fields = ("state", "requests", "memory", "last_error", "created_at", "updated_at")
    actions = ("load_models", "unload_models", "reload_models")
    change_form_template = "admin/mlx_serving/servedmodel/change_form.html"
    change_list_template = "admin/mlx_serving/live_list.html"

    class Media:
        """Style."""

        css = {"all": ("mlx_serving/admin/admin.css",)}

    def get_queryset(self, request: HttpRequest) -> QuerySet[ServedModel]:
        """Return the models with their newest workers, in two queries whatever their number."""
        newest = Worker.objects.order_by("-started_at", "-pk")[:_NEWEST]
        return super().get_queryset(request).prefetch_related(Prefetch("workers", newest, to_attr="newest_workers"))

    def get_fieldsets(self, request: HttpRequest, obj: ServedModel | None = None) -> Any:
        """Return the fields; a model that does not exist yet has no state."""
        return self.fieldsets if obj is not None else self.fieldsets[1:]

    # --- what is shown -----------------------------------------------------------------------------------------------

    @admin.display(description=gettext_lazy("state"))
    def state(self, model: ServedModel) -> SafeString:
        """Show the state of the worker that says most, or that there is none."""
        worker = self._worker(model)
        now = timezone.now()
        if worker is None or (worker.state == Worker.State.STOPPED and not model.wanted):
            return badge("idle", _("waiting for a supervisor") if model.wanted else _("not loaded"))
        if worker.state == Worker.State.FAILED and not model.wanted:
            return badge("idle", _("not loaded"))
        return worker_badge(worker, now)

    @admin.display(description=gettext_lazy("running / waiting"))
    def requests(self, model: ServedModel) -> str:
        """Show the requests of all its workers."""
        workers = self._alive(model)
        if not workers:
            return NOTHING
        return f"{sum(worker.running for worker in workers)} / {sum(worker.waiting for worker in workers)}"

    @admin.display(description=gettext_lazy("memory"))
    def memory(self, model: ServedModel) -> str:
        """Show the memory of all its workers."""
        size = sum(worker.memory_bytes for worker in self._alive(model))
        return human_bytes(size) if size else NOTHING

    @admin.display(description=gettext_lazy("last error"))
    def last_error(self, model: ServedModel) -> str:
        """Show why its newest worker failed."""
        workers = self._workers(model)
        error = workers[0].last_error if workers else ""
        return Truncator(error).chars(200) or NOTHING

    @staticmethod
    def _workers(model: ServedModel) -> list[Worker]:
        return getattr(model, "newest_workers", [])

    def _worker(self, model: ServedModel) -> Worker | None:
        return telling(self._workers(model))

    def _alive(self, model: ServedModel) -> list[Worker]:
        ended = {Worker.State.FAILED, Worker.State.STOPPED}
        return [worker for worker in self._workers(model) if worker.state not in ended]

    # --- what can be done --------------------------------------------------------------------------------------------

    @admin.action(description=gettext_lazy("Load the selected models"), permissions=["change"])
    def load_models(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        """Ask for workers."""
        self._run(request, COMMANDS["load"], queryset)

    @admin.action(description=gettext_lazy("Unload the selected models"), permissions=["change"])
    def unload_models(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        """Ask for no workers."""
        self._run(request, COMMANDS["unload"], queryset)

    @admin.action(description=gettext_lazy("Reload the selected models"), permissions=["change"])
    def reload_models(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        """Ask for fresh workers."""
        self._run(request, COMMANDS["reload"], queryset)

    def _run(self, request: HttpRequest, command: Command, queryset: QuerySet[ServedModel]) -> None:
        # By key, because the selection may be filtered on what the command changes.
        models = list(queryset)
        changed = command.run(ServedModel.objects.filter(pk__in=[model.pk for model in models]))
        for model in models:
            self.log_change(request, model, command.logged)
        self.message_user(request, command.done(changed), messages.SUCCESS if changed else messages.INFO)

    def get_urls(self) -> list[URLPattern]:
        """Add the addresses of the buttons on a model's page."""
        view = self.admin_site.admin_view(require_POST(self.command_view))
        name = "mlx_serving_servedmodel_command"
        return [path("<path:object_id>/command/<slug:command>/", view, name=name), *super().get_urls()]

    def command_view(self, request: HttpRequest, object_id: str, command: str) -> HttpResponse:
        """Load, unload or reload one model."""
        queryset = self.get_queryset(request).filter(pk=unquote(object_id))
        model = queryset.first()
        if model is None or command not in COMMANDS:
            raise Http404
        if not self.has_change_permission(request, model):
            raise PermissionDenied
        self._run(request, COMMANDS[command], queryset)
        return HttpResponseRedirect(reverse("admin:mlx_serving_servedmodel_change", args=[model.pk]))

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show a model with its buttons."""
        context = {"mlx_commands": list(COMMANDS.values()), **(extra_context or {})}
        return super().change_view(request, object_id, form_url, context)

    def get_deleted_objects(
        self, objs: Sequence[Any] | QuerySet[Any, Any], request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        """Return what goes with a model. Nobody may delete workers by hand, but they go with their model."""
        deleted, counts, missing, protected = super().get_deleted_objects(objs, request)
        return deleted, counts, missing - {str(Worker._meta.verbose_name)}, protected
