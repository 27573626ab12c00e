"""What is stored: the models that a site wants served, the workers that run, and the feature flags.

Admin, commands and API write the wanted state to `ServedModel`; the supervisor writes what it observes to `Worker`.
No prompt and no completion is ever stored here.
"""

from __future__ import annotations

from django.core.validators import MinValueValidator, RegexValidator
from django.db import models
from django.utils.translation import gettext_lazy as _


class ServedModel(models.Model):
    """A model that clients can name, and whether it should be loaded."""

    class Dtype(models.TextChoices):
        """Number format of the weights in memory."""

        AUTO = "auto", _("as stored; float32 on CPU")
        FLOAT32 = "float32", "float32"
        BFLOAT16 = "bfloat16", "bfloat16"
        FLOAT16 = "float16", "float16"

    name = models.CharField(
        _("name"),
        max_length=200,
        unique=True,
        validators=[RegexValidator(r"^[\w.\-/]+\Z", _("Letters, digits, and . _ - / only."))],
        help_text=_("The name that clients use."),
    )
    source = models.CharField(
        _("source"),
        max_length=500,
        help_text=_(
            "A Hugging Face id, a folder on the workers' host, or “demo” for the model that ships with the app."
        ),
    )
    revision = models.CharField(_("revision"), max_length=100, blank=True, help_text=_("Branch, tag or commit."))
    wanted = models.BooleanField(_("loaded"), default=True, help_text=_("Whether workers should run for it."))
    dtype = models.CharField(_("number format"), max_length=10, choices=Dtype.choices, default=Dtype.AUTO)
    context_length = models.PositiveIntegerField(
        _("context length"),
        null=True,
        blank=True,
        validators=[MinValueValidator(16)],
        help_text=_("Tokens of prompt and output together; empty takes the model's own limit."),
    )
    max_rows = models.PositiveIntegerField(
        _("batch limit"),
        null=True,
        blank=True,
        validators=[MinValueValidator(1)],
        help_text=_("Sequences decoded together; empty takes the setting MAX_ROWS."),
    )
    reload_token = models.PositiveIntegerField(default=0, editable=False)
    """Raised to ask for a fresh worker; a worker that was started for a lower value is replaced."""
    created_at = models.DateTimeField(_("added"), auto_now_add=True)
    updated_at = models.DateTimeField(_("changed"), auto_now=True)

    class Meta:
        verbose_name = _("model")
        verbose_name_plural = _("models")
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Worker(models.Model):
    """A worker process as its supervisor last saw it. A new process is a new row."""

    class State(models.TextChoices):
        """Life of a worker process."""

        STARTING = "starting", _("starting")
        LOADING = "loading", _("loading")
        READY = "ready", _("ready")
        DRAINING = "draining", _("draining")
        STOPPED = "stopped", _("stopped")
        FAILED = "failed", _("failed")

    id = models.CharField(primary_key=True, max_length=40, editable=False)
    model = models.ForeignKey(ServedModel, on_delete=models.CASCADE, related_name="workers", verbose_name=_("model"))
    host = models.CharField(_("host"), max_length=200)
    endpoint = models.CharField(_("endpoint"), max_length=200)
    pid = models.PositiveIntegerField(_("process id"), null=True)
    state = models.CharField(_("state"), max_length=10, choices=State.choices, default=State.STARTING, db_index=True)
    reload_token = models.PositiveIntegerField(default=0)
    progress = models.FloatField(_("load progress"), default=0.0)
    running = models.PositiveIntegerField(_("running"), default=0)
    waiting = models.PositiveIntegerField(_("waiting"), default=0)
    kv_bytes = models.BigIntegerField(_("KV cache"), default=0)
    memory_bytes = models.BigIntegerField(_("memory"), default=0)
    step_ms = models.FloatField(_("step time"), default=0.0)
    load = models.JSONField(_("load"), default=dict, blank=True)
    """`inference.protocol.Load` as a dictionary, counters included; metrics are made from it."""
    info = models.JSONField(_("model information"), default=dict, blank=True)
    """`inference.protocol.ModelInfo` as a dictionary, once the model is loaded."""
    last_error = models.TextField(_("last error"), blank=True)
    started_at = models.DateTimeField(_("started"), auto_now_add=True)
    heartbeat_at = models.DateTimeField(_("last heartbeat"), null=True)
    stopped_at = models.DateTimeField(_("stopped"), null=True)

    class Meta:
        verbose_name = _("worker")
        verbose_name_plural = _("workers")
        ordering = ("-started_at",)

    def __str__(self) -> str:
        return self.id


class FeatureFlag(models.Model):
    """A flag's value in the database. Which flags exist is fixed by `flags.py`."""

    name = models.CharField(_("name"), max_length=50, unique=True)
    enabled = models.BooleanField(_("on"), null=True, help_text=_("Unset leaves the settings or the default in force."))
    updated_at = models.DateTimeField(_("changed"), auto_now=True)

    class Meta:
        verbose_name = _("feature flag")
        verbose_name_plural = _("feature flags")
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name
