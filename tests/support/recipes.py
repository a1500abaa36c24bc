"""Recipes for tiny models."""

from pathlib import Path
from typing import Any

from compressor.plan.recipe import Recipe, make_recipe


def short_recipe(model: Path, output: Path, passes: list[Any], **top: Any) -> Recipe:
    """Passes on a few short rows of the bundled texts."""
    return make_recipe(
        {
            "model": str(model),
            "output": str(output),
            "calibration": {"samples": 8, "length": 32},
            "passes": passes,
            **top,
        }
    )
