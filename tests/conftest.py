"""Fixtures for all tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """The module tests/tiny_models.py, which is on no path."""
    spec = importlib.util.spec_from_file_location(
        "tiny_models", Path(__file__).with_name("tiny_models.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_model(
    tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """tiny_model(model_type, **options of tiny_models.build) → checkpoint folder, built once.

    The folder is shared by all tests: copy it before changing it.
    """
    built: dict[str, Path] = {}

    def get(model_type: str, **options: Any) -> Path:
        key = f"{model_type} {sorted(options.items())}"
        if key not in built:
            built[key] = tiny_models.build(
                model_type, tmp_path_factory.mktemp(model_type), **options
            )
        return built[key]

    return get
