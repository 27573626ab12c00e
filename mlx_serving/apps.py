"""The Django application's configuration."""

from __future__ import annotations

from django.apps import AppConfig


class MlxServingConfig(AppConfig):
    """Registers the app, its system checks and its metrics."""

    name = "mlx_serving"
    label = "mlx_serving"
    verbose_name = "MLX serving"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Import the modules that register themselves."""
        from . import checks, metrics

        checks.register_all()
        metrics.register_collectors()
