"""`manage.py runworkers`: run the workers of this host, for as long as the command runs."""

from __future__ import annotations

import asyncio
import logging
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.db import Error as DatabaseProblem
from django.db import connection

from mlx_serving.conf import settings
from mlx_serving.fleet import lifecycle, runtime_dir
from mlx_serving.fleet.store import Store
from mlx_serving.fleet.supervisor import Supervisor
from mlx_serving.models import ServedModel

EXIT_FORCED = 1
EXIT_UNUSABLE = 3


class Command(BaseCommand):
    """Starts a worker process for every model that should be loaded, and keeps it running."""

    help = (
        "Runs the worker processes of this host: one for each model that is to be loaded. Ctrl-C or SIGTERM drains "
        "them, a second one stops them at once. Exit codes: 0 after a drain, 1 when stopped at once, 3 when it could "
        "not begin."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "--add",
            metavar="SOURCE",
            help="first add this model if it is missing: a Hugging Face id, a folder, or “demo”",
        )
        parser.add_argument("--name", help="the name for clients of the model that --add adds")

    def handle(self, *, add: str | None, name: str | None, verbosity: int, **_: Any) -> None:
        """Add a model if asked to, then supervise until told to stop."""
        if name and not add:
            raise CommandError("--name needs --add.")
        _log_to_console(verbosity)
        self._require_tables()
        if add:
            self._add(add, name or "")
        config = settings()
        folder = Path(config.RUNTIME_DIR)
        try:
            runtime_dir.prepare(folder)
            with runtime_dir.SupervisorLock(folder):
                runtime_dir.remove_sockets(folder)
                # This thread is done with the database; an idle connection would only be in the way.
                connection.close()
                drained = asyncio.run(_supervise(Store(config.HOST, folder)))
        except runtime_dir.RuntimeDirError as error:
            raise CommandError(f"RUNTIME_DIR: {error}.", returncode=EXIT_UNUSABLE) from error
        if not drained:
            raise SystemExit(EXIT_FORCED)

    def _require_tables(self) -> None:
        try:
            tables = connection.introspection.table_names()
        except DatabaseProblem as error:
            # Not fatal: a host may come up before its database does, and the supervisor retries.
            self.stderr.write(f"The database does not answer yet: {error}")
            return
        if ServedModel._meta.db_table not in tables:
            raise CommandError("The app's tables are missing. Run “manage.py migrate” first.", returncode=EXIT_UNUSABLE)

    def _add(self, source: str, name: str) -> None:
        if (folder := Path(source).expanduser()).is_dir() and source != lifecycle.DEMO_SOURCE:
            source = str(folder.resolve())
        if problem := lifecycle.source_problem(source):
            raise CommandError(f"--add {source}: {problem}")
        name = name or lifecycle.suggest_name(source)
        if existing := ServedModel.objects.filter(name=name).first():
            if existing.source != source:
                raise CommandError(f"{name} is there already, with the source {existing.source}. Give another --name.")
            self.stdout.write(f"{name} is there already.")
            return
        model = ServedModel(name=name, source=source)
        try:
            model.full_clean()
        except ValidationError as error:
            raise CommandError(f"--add {source}: {' '.join(error.messages)}") from error
        model.save()
        self.stdout.write(f"Added {name}.")


async def _supervise(store: Store) -> bool:
    return await Supervisor(settings(), store).run()


def _log_to_console(verbosity: int) -> None:
    """Show the supervisor's and the workers' lines, unless the site's LOGGING takes care of them already."""
    for name in ("mlx_serving.fleet", "mlx_serving.worker"):
        logger = logging.getLogger(name)
        if not logger.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
            logger.addHandler(handler)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.DEBUG if verbosity > 1 else logging.WARNING if verbosity == 0 else logging.INFO)
