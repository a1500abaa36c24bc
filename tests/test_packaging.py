"""A wheel holds what the tree holds: every module, and every file that modules read."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_is_in_a_package_that_is_listed() -> None:
    """An editable install finds what stands in no list, and a wheel then lacks it."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    places, data = told["package-dir"], told["package-data"]

    def folder(package: str) -> Path:
        if package in places:
            return ROOT / places[package]
        parent, _, name = package.rpartition(".")
        return folder(parent) / name

    packed: set[Path] = set()
    for package in told["packages"]:
        for pattern in ("*.py", *data.get(package, ())):
            files = set(folder(package).glob(pattern))
            assert files or pattern == "*.py", f"{package} has no {pattern}"
            packed |= files
    there = {
        path
        for place in places.values()
        for path in (ROOT / place).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert sorted(there - packed) == []
