"""A base with a fine-tune of it, and the delta that a recipe makes of the two."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compressor.plan.recipe import make_recipe
from compressor.run.session import Prepared, choose_device, compile_checkpoint, prepare

CPU = choose_device("cpu")
Pair = Callable[..., tuple[Path, Path]]


def pairs(tiny_model: Callable[..., Path], folder: Path) -> Pair:
    """pair(model_type, only=…) → a base and its fine-tune, in which tensors whose name contains
    one of `only` (all by default) differ from the base's."""

    def make(
        model_type: str, *, only: tuple[str, ...] = ("",), **options: Any
    ) -> tuple[Path, Path]:
        base, fine = tiny_model(model_type, **options), folder / "fine"
        shutil.copytree(base, fine)
        tensors = load_file(fine / "model.safetensors")
        generator = torch.Generator().manual_seed(7)
        for name, tensor in tensors.items():
            if any(part in name for part in only):
                # Many small changes and a few large ones, as a fine-tune has them.
                noise = torch.randn(tensor.shape, generator=generator) ** 3 * 0.01
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, fine / "model.safetensors", metadata={"format": "pt"})
        return base, fine

    return make


def prepared(base: Path, fine: Path, output: Path, **params: Any) -> Prepared:
    top = params.pop("top", {})
    recipe = make_recipe(
        {
            "model": str(fine),
            "output": str(output),
            "calibration": {"samples": 8, "length": 16},
            "passes": [{"bitdelta": {"base": str(base), "distill": "none", **params}}],
            **top,
        }
    )
    return prepare(recipe, device=CPU)


def run(base: Path, fine: Path, output: Path, **params: Any) -> Path:
    return compile_checkpoint(prepared(base, fine, output, **params)).output


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
