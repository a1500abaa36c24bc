"""What is wrong with a recipe beside its passes: lengths, the gate, tasks, publishing."""

from __future__ import annotations

import importlib.util

from compressor_calibration.stats import StatNeeds

from compressor.checkpoint.source import Source
from compressor.errors import CompressError, InputError
from compressor.plan.recipe import Recipe


def check_recipe(recipe: Recipe, source: Source) -> list[CompressError]:
    """Rows longer than the model, tasks without their harness, a gate that could never be judged,
    publishing that nothing guards."""
    problems: list[CompressError] = [*_too_long(recipe, source)]
    wanted = recipe.evaluate
    if wanted is not None and wanted.tasks and importlib.util.find_spec("lm_eval") is None:
        problems.append(
            InputError(
                "evaluate.tasks needs lm-evaluation-harness, which is not installed",
                hint="pip install 'compressor[harness]', or drop the tasks",
            )
        )
    if recipe.gate is not None:
        missing = recipe.gate.unmeasured(
            evaluated=wanted is not None,
            against_original=wanted is not None and wanted.against_original,
            passkey=wanted is not None and wanted.passkey is not None,
            tasks=wanted.tasks if wanted is not None else (),
        )
        if missing:
            problems.append(
                InputError(
                    f"gate: nothing in this recipe measures {', '.join(missing)}",
                    hint="ask for it under evaluate: (against_original, passkey, tasks), "
                    "or drop the limit",
                )
            )
    if recipe.publish is not None and not recipe.verify:
        problems.append(
            InputError("publish: unverified files are not published", hint="verify: true")
        )
    return problems


def _too_long(recipe: Recipe, source: Source) -> list[InputError]:
    """Rows that a model has no positions for: learned ones end, and rotary ones are not evaluated
    beyond what the model was made for."""
    positions = source.layout.sizes.positions
    if positions is None:
        return []
    learned = source.arch.embedding.position is not None
    lengths = {}
    if learned and any(step.params.needs().stats != StatNeeds() for step in recipe.passes):
        lengths["calibration.length"] = recipe.calibration.length
    if recipe.evaluate is not None:
        lengths["evaluate.length"] = recipe.evaluate.length
        if recipe.evaluate.passkey is not None:
            lengths["evaluate.passkey.lengths"] = max(recipe.evaluate.passkey.lengths)
    return [
        InputError(
            f"{key}: rows of {length} tokens, but the model has {positions} "
            f"{'learned ' if learned else ''}positions",
            hint=f"at most {positions}",
        )
        for key, length in lengths.items()
        if length > positions
    ]
