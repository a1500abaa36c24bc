"""What a plan says of the activation store that a recipe names."""

from collections.abc import Iterator
from pathlib import Path

import torch

from compressor.errors import InputError
from compressor.ir.layout import ModelLayout
from compressor.plan.recipe import Recipe
from compressor.runner.activations import lacking, refusal


def store_problem(recipe: Recipe) -> InputError | None:
    """Why its folder will not do."""
    wanted = recipe.activation_store
    return None if wanted is None else refusal(Path(wanted.dir).expanduser())


def store_notes(
    recipe: Recipe, layout: ModelLayout, dtype: torch.dtype, *, calibrated: bool
) -> Iterator[str]:
    """What one walk over the rows would keep there, and what hinders it."""
    wanted = recipe.activation_store
    if wanted is None:
        return
    rows = recipe.calibration.samples * recipe.calibration.length if calibrated else 0
    if recipe.evaluate is not None and recipe.evaluate.against_original:
        rows += recipe.evaluate.windows * recipe.evaluate.length
    width = max(linear.in_features for linear in layout.head.linears)
    needed = rows * width * dtype.itemsize * len(layout.blocks)
    yield (
        f"activation store: one walk over this recipe's rows keeps {needed / 1e9:.3g} GB; "
        f"{wanted.dir} may take {wanted.max_size / 1e9:.3g} GB"
    )
    if needed > wanted.max_size:
        yield (
            "activation store: the first blocks of a walk are kept, the rest is computed each "
            "time (activation_store.max_size)"
        )
    if (note := lacking(Path(wanted.dir).expanduser(), wanted.max_size)) is not None:
        yield note
