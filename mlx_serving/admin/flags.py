"""The page of the feature flags: one row for each flag of `flags.FLAGS`, switched in place.

The rows come from the code and not from the database, which holds only the values that somebody has set.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.translation import gettext as _
from django.views.decorators.http import require_POST

from .. import flags
from ..conf import settings
from ..models import FeatureFlag

CHOICES: dict[str, bool | None] = {"on": True, "off": False, "unset": None}
"""What a button sends, and what is stored for it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A flag as the page shows it."""

    flag: flags.Flag
    enabled: bool
    """The effective value."""
    source: str
    """Where that comes from."""
    stored: bool | None
    """What the database has."""
    locked: bool
    """Whether the environment decides, so that the database is not asked."""
    dangerous: bool
    """Whether it is the kill switch."""


def rows(environ: dict[str, str] | os._Environ[str], database: dict[str, bool | None], site: Any) -> list[Row]:
    """Return the rows of the page, the kill switch first.

    Args:
        environ: the environment of this process.
        database: the stored values.
        site: the values in the settings.
    """
    values = flags.resolve(environ, database, site)
    found = [
        Row(
            flag=flag,
            enabled=values[name].enabled,
            source=values[name].source,
            stored=database.get(name),
            locked=flags.parse_bool(environ.get(flag.env, "")) is not None,
            dangerous=name == flags.KILL_SWITCH,
        )
        for name, flag in flags.FLAGS.items()
    ]
    return sorted(found, key=lambda row: not row.dangerous)


@admin.register(FeatureFlag)
class FeatureFlagAdmin(admin.ModelAdmin):
    """The flags, as one page."""

    class Media:
        """Style."""

        css = {"all": ("mlx_serving/admin/admin.css",)}

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody: the code says which flags exist."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: FeatureFlag | None = None) -> bool:
        """Nobody: a flag is unset, not deleted."""
        return False

    def get_urls(self) -> list[URLPattern]:
        """Return the page, and where its buttons lead."""
        set_view = self.admin_site.admin_view(require_POST(self.set_view))
        return [
            path("", self.admin_site.admin_view(self.changelist_view), name="mlx_serving_featureflag_changelist"),
            path("<slug:name>/set/<slug:choice>/", set_view, name="mlx_serving_featureflag_set"),
            path(
                "<int:object_id>/change/",
                self.admin_site.admin_view(self.one_view),
                name="mlx_serving_featureflag_change",
            ),
            path(
                "<int:object_id>/history/",
                self.admin_site.admin_view(self.history_of),
                name="mlx_serving_featureflag_history",
            ),
        ]

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """Show every flag."""
        if not self.has_view_or_change_permission(request):
            raise PermissionDenied
        database = dict(FeatureFlag.objects.values_list("name", "enabled"))
        context = {
            **self.admin_site.each_context(request),
            "title": _("Feature flags"),
            "opts": self.opts,
            "media": self.media,
            "rows": rows(os.environ, database, settings().FLAGS),
            "may_change": self.has_change_permission(request),
            **(extra_context or {}),
        }
        return TemplateResponse(request, "admin/mlx_serving/featureflag/change_list.html", context)

    def one_view(self, request: HttpRequest, object_id: int) -> HttpResponse:
        """Lead from links such as the admin's recent actions to the one page there is."""
        return HttpResponseRedirect(reverse("admin:mlx_serving_featureflag_changelist"))

    def history_of(self, request: HttpRequest, object_id: int) -> HttpResponse:
        """Show who changed a flag."""
        return self.history_view(request, str(object_id))

    def set_view(self, request: HttpRequest, name: str, choice: str) -> HttpResponse:
        """Store a flag's value, or that it has none."""
        if not self.has_change_permission(request):
            raise PermissionDenied
        if name not in flags.FLAGS or choice not in CHOICES:
            raise Http404
        here = HttpResponseRedirect(reverse("admin:mlx_serving_featureflag_changelist"))
        flag = flags.FLAGS[name]
        if flags.parse_bool(os.environ.get(flag.env, "")) is not None:
            self.message_user(request, _("%s is decided by the environment.") % name, messages.WARNING)
            return here
        stored, _created = FeatureFlag.objects.update_or_create(name=name, defaults={"enabled": CHOICES[choice]})
        self.log_change(request, stored, f"{name}: {choice}")
        flags.refresh(force=True)
        self.message_user(
            request, _("%(name)s is now %(choice)s.") % {"name": name, "choice": choice}, messages.SUCCESS
        )
        return here
