"""Facts about the machine and the software, so that two results can be compared."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("mlx", "mlx-lm", "django", "channels", "daphne", "uvicorn", "uvloop", "msgspec", "numpy", "tokenizers")


def cpu_name() -> str:
    """Return the processor's name as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter for speed, those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> str:
    """Return the commit, with `+` when files have changed since; empty outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S607 - the user's own git
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain") else "")
    except OSError:
        return ""


def facts(folder: Path) -> dict[str, Any]:
    """Return what is known without loading a model."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "git_revision": git_revision(folder),
        "load_average_at_start": os.getloadavg()[0],
    }
