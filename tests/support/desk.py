"""A user's folder, with a model to spoil and a recipe to get wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

RTN: dict[str, Any] = {"rtn": {"bits": 4, "group_size": 32}}


@dataclass
class Desk:
    """A user's folder: a model, and what is about to be typed."""

    folder: Path
    model: Path
    llama: Path
    opt: Path
    tied: Path
    rest: dict[str, Any] = field(default_factory=dict)

    def recipe(self, text: str | None = None, **changes: Any) -> str:
        """A recipe file: a working one with changes, or any text."""
        path = self.folder / "recipe.yaml"
        output = str(self.folder / "out")
        data = {"model": str(self.model), "output": output, "passes": [RTN], **changes}
        data = {key: value for key, value in data.items() if value is not ...}
        path.write_text(yaml.safe_dump(data) if text is None else text)
        return str(path)

    def copy(self) -> Path:
        """A copy of the model that may be spoiled."""
        self.model = self.folder / "model"
        shutil.copytree(self.llama, self.model)
        return self.model

    def edit_config(self, **changes: Any) -> None:
        path = self.copy() / "config.json"
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

    def edit_weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        path = self.copy() / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def write(self, name: str, data: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)
