"""Fixtures for all tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from compressor.verify.kernels.check import enable_interpreter

enable_interpreter()  # before any test's imports bring Triton with them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none, whatever `-m` selects."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Nothing here has to outlive the machine, which alone syncing is for; it takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """The module tests/support/tiny_models.py."""
    from tests.support import tiny_models

    return tiny_models


@pytest.fixture(scope="session")
def hub_server() -> ModuleType:
    """The module tests/support/hub_server.py."""
    from tests.support import hub_server

    return hub_server


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


@pytest.fixture()
def hub(hub_server: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub on localhost that this process talks to as the user `me`, with a cache of its own."""
    from huggingface_hub import constants

    with hub_server.serving() as found:
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield found


@pytest.fixture()
def xet_hub(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The same with a Xet store, which its client uses wherever hf_xet is installed."""
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet-cache"))
    from tests.support import xet_store

    hub.xet, hub.routes = xet_store.XetStore(), xet_store.ROUTES
    return hub
