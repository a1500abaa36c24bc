"""Files beside the repository: vectors made with published implementations, small trained models.

GOLDEN_DIR and MODELS_DIR say where they are; a test that wants one that is not there is skipped.
"""

import os
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared" / "golden"))
MODELS = Path(os.environ.get("MODELS_DIR", GOLDEN.parent / "models"))


def vectors(name: str) -> dict[str, Tensor]:
    """The tensors of a file, such as "quant/awq_pack"."""
    return vectors_and_notes(name)[0]


def vectors_and_notes(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same with what the file says of how they were made."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no golden vectors at {path}; set GOLDEN_DIR")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def trained_model(name: str) -> Path:
    """The folder of a small trained model."""
    folder = MODELS / name
    if not folder.is_dir():
        pytest.skip(f"no trained model at {folder}; set MODELS_DIR")
    return folder
