"""Fixtures for tests in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference.loading import LoadedModel, load
from inference.protocol import WorkerConfig
from tests.tiny import build_tiny_model


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a very small model."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_model_path: Path) -> LoadedModel:
    """A very small model, loaded."""
    return load(WorkerConfig(worker_id="w", model="tiny", source=str(tiny_model_path)), lambda _fraction: None)
