"""What a person asks of models: add one, load, unload, reload. Used by the admin and by commands.

Nothing here starts or stops a process: it writes the wanted state, and the supervisor of each host acts on it.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from django.db.models import F, QuerySet
from django.utils import timezone

from ..models import ServedModel

DEMO_SOURCE = "demo"
DEMO_NAME = "mlx-serving-demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_NOT_IN_NAME = re.compile(r"[^\w.\-/]+")


def source_problem(source: str) -> str:
    """Return why a text cannot be a model's source, or an empty string. Whether it exists only its host can say."""
    if source == DEMO_SOURCE or PurePath(source).is_absolute() or _HUB_ID.fullmatch(source):
        return ""
    return "Give a Hugging Face id such as “org/model”, the absolute path of a folder, or “demo”."


def suggest_name(source: str) -> str:
    """Return the name for clients that suits a source: the Hugging Face id itself, or the folder's name."""
    if source == DEMO_SOURCE:
        return DEMO_NAME
    name = PurePath(source).name if PurePath(source).is_absolute() else source
    return _NOT_IN_NAME.sub("-", name).strip("-")


def load(models: QuerySet[ServedModel]) -> int:
    """Ask for workers for these models; return how many were not asked for before."""
    return models.filter(wanted=False).update(wanted=True, updated_at=timezone.now())


def unload(models: QuerySet[ServedModel]) -> int:
    """Ask for these models' workers to finish and stop; return how many models had been asked for."""
    return models.filter(wanted=True).update(wanted=False, updated_at=timezone.now())


def reload(models: QuerySet[ServedModel]) -> int:
    """Ask for a fresh worker of each of these models that is loaded; return how many those are."""
    return models.filter(wanted=True).update(reload_token=F("reload_token") + 1, updated_at=timezone.now())
