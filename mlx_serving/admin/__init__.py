"""The admin's pages: models, workers, feature flags. Importing this package registers them."""

from .flags import FeatureFlagAdmin
from .models import ServedModelAdmin
from .workers import WorkerAdmin

__all__ = ["FeatureFlagAdmin", "ServedModelAdmin", "WorkerAdmin"]
