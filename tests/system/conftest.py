"""Fixtures of real processes.

`deployment` is a site of a test's own, with nothing started; `supervisor` starts its workers. `site` is one for the
whole session, served by daphne with the demo model, unless the test is parametrised to another server:
`@pytest.mark.parametrize("server_kind", ["daphne", "uvicorn"], indirect=True)`.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.deployments import DEMO_MODEL, TINY_MODEL, Deployment, Program, Site, deploy, serve


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with every table and no row of ours."""
    folder = tmp_path_factory.mktemp("migrated")
    with deploy(folder) as made:
        made.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / "db.sqlite3"


@pytest.fixture
def deployment(tmp_path: Path, migrated_database: Path) -> Iterator[Deployment]:
    """A site of this test's own, with nothing started and no model."""
    with deploy(tmp_path / "site", migrated_database) as made:
        yield made


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that loads at once."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    # In a process of its own, so that the tests' process has no mlx in it.
    subprocess.run([sys.executable, str(Path(__file__).with_name("tiny_model.py")), str(folder)], check=True)
    return folder


@pytest.fixture
def supervisor(deployment: Deployment, tiny_model: Path) -> Program:
    """The deployment's supervisor, with one ready worker for `TINY_MODEL`."""
    deployment.add_model(TINY_MODEL, tiny_model)
    program = deployment.supervise()
    deployment.wait_for_worker("ready")
    return program


@pytest.fixture(scope="session")
def demo_deployment(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[Deployment]:
    """A site's folder for the session, with a supervisor and a ready worker for the demo model."""
    with deploy(tmp_path_factory.mktemp("demo") / "site", migrated_database) as made:
        made.supervise("--add", "demo")
        made.wait_for_worker("ready", model=DEMO_MODEL)
        yield made


@pytest.fixture(scope="session")
def server_kind(request: pytest.FixtureRequest) -> str:
    """Which web server `site` runs: daphne, unless a test is parametrised to another."""
    return str(getattr(request, "param", "daphne"))


@pytest.fixture(scope="session")
def site(demo_deployment: Deployment, server_kind: str) -> Iterator[Site]:
    """A web server of kind `server_kind` that answers with the demo model."""
    with serve(demo_deployment, server_kind) as (base_url, server):
        yield Site(base_url, DEMO_MODEL, demo_deployment, server, demo_deployment.programs[0])
