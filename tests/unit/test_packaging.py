"""What a built distribution holds, and what it asks to be installed with."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mlx_serving

ROOT = Path(__file__).resolve().parent.parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in requirements}


def declared() -> list[Requirement]:
    project = PYPROJECT["project"]
    groups = [
        project["dependencies"],
        *(lines for name, lines in project["optional-dependencies"].items() if name != "cuda"),
    ]
    requirements = [Requirement(line) for lines in groups for line in lines]
    return [each for each in requirements if each.name != project["name"]]


@pytest.mark.parametrize("package", ["mlx_serving", "inference"])
def test_every_data_file_is_in_the_package(package: str) -> None:
    folder = ROOT / package
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"][package]
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    there = {
        path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py"
    }
    assert there - packed == set()
    assert folder / "py.typed" in packed


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_the_tested_version_satisfies_the_declared_bounds(requirement: Requirement) -> None:
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned, f"{requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(pinned)


def test_the_changelog_has_the_current_version() -> None:
    assert f"## [{mlx_serving.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
