"""The import rules: which part of the tree may know which other."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

LAYERS = ("api", "gateway", "fleet")
"""From the top down: a layer imports from itself and from those after it."""

ENGINE_ONLY = {"mlx", "mlx_lm", "transformers", "tokenizers", "numpy", "huggingface_hub"}
SITE_ONLY = {"django", "channels", "daphne", "asgiref", "django_prometheus", "prometheus_client", "mlx_serving"}
MAY_IMPORT_API = {"mlx_serving.routing", "mlx_serving.urls"}
BUILD_TOOLS = {"tests", "benchmarks", "project"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules(package: str) -> dict[str, Path]:
    return {module_name(path): path for path in sorted((ROOT / package).rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of everything that a file imports, wherever in it, `a.b.c` for `from a.b import c`."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offences(package: str, forbidden: object) -> list[str]:
    assert callable(forbidden)
    return [
        f"{module}: {name}"
        for module, path in modules(package).items()
        for name in imported(path)
        if forbidden(module, name)
    ]


def test_the_app_knows_the_engine_by_its_protocol_alone() -> None:
    def forbidden(_module: str, name: str) -> bool:
        return name.split(".", maxsplit=1)[0] in ENGINE_ONLY or (
            within(name, "inference") and not within(name, "inference.protocol")
        )

    assert offences("mlx_serving", forbidden) == []


def test_the_engine_knows_nothing_of_the_site() -> None:
    assert offences("inference", lambda _, name: name.split(".")[0] in SITE_ONLY) == []


def test_the_protocol_knows_neither_side() -> None:
    names = {name.split(".")[0] for name in imported(ROOT / "inference" / "protocol.py")}
    assert names & (ENGINE_ONLY | SITE_ONLY) == set()


@pytest.mark.parametrize("position", range(1, len(LAYERS)))
def test_a_layer_imports_downwards_only(position: int) -> None:
    above = [f"mlx_serving.{layer}" for layer in LAYERS[:position]]
    layer = f"mlx_serving.{LAYERS[position]}"

    def forbidden(module: str, name: str) -> bool:
        return within(module, layer) and any(within(name, upper) for upper in above)

    assert offences("mlx_serving", forbidden) == []


def test_only_routes_import_the_api() -> None:
    def forbidden(module: str, name: str) -> bool:
        return (
            within(name, "mlx_serving.api") and not within(module, "mlx_serving.api") and module not in MAY_IMPORT_API
        )

    assert offences("mlx_serving", forbidden) == []


@pytest.mark.parametrize("package", ["mlx_serving", "inference"])
def test_the_packages_never_import_what_is_not_shipped(package: str) -> None:
    assert offences(package, lambda _, name: name.split(".")[0] in BUILD_TOOLS) == []


def test_every_third_party_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {normal(re.split(r"[\[<>=; ]", line)[0]) for line in project["dependencies"]}
    # Django's own parts, which come with it by its own promise.
    declared |= {"asgiref", "sqlparse"}
    owners = packages_distributions()
    used = {
        name.split(".")[0]
        for package in ("mlx_serving", "inference")
        for path in modules(package).values()
        for name in imported(path)
    }
    foreign = used - set(sys.stdlib_module_names) - {"mlx_serving", "inference"}
    undeclared = {name for name in foreign if not {normal(owner) for owner in owners.get(name, [])} & declared}
    assert undeclared == set()


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
