"""What is wrong with a recipe beside its passes: lengths, the gate, tasks, publishing."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

from compressor_calibration.stats import StatNeeds

from compressor.checkpoint.source import Source
from compressor.errors import CompressError, InputError
from compressor.methods.base import Needs
from compressor.plan.recipe import Recipe


def check_recipe(recipe: Recipe, source: Source) -> Iterator[CompressError]:
    """Rows longer than the model or than what is calibrated, tasks without their harness, a gate
    that could never be judged, publishing that nothing guards."""
    yield from _too_long(recipe, source)
    yield from _past_calibration(recipe)
    yield from _unmapped(recipe, source)
    wanted = recipe.evaluate
    if wanted is not None and wanted.tasks and importlib.util.find_spec("lm_eval") is None:
        yield InputError(
            "evaluate.tasks needs lm-evaluation-harness, which is not installed",
            hint="pip install 'compressor[harness]', or drop the tasks",
        )
    if recipe.gate is not None:
        missing = recipe.gate.unmeasured(
            evaluated=wanted is not None,
            against_original=wanted is not None and wanted.against_original,
            passkey=wanted is not None and wanted.passkey is not None,
            tasks=wanted.tasks if wanted is not None else (),
        )
        if missing:
            yield InputError(
                f"gate: nothing in this recipe measures {', '.join(missing)}",
                hint="ask for it under evaluate: (against_original, passkey, tasks), "
                "or drop the limit",
            )
    if recipe.publish is not None and not recipe.verify:
        yield InputError("publish: unverified files are not published", hint="verify: true")


def _unmapped(recipe: Recipe, source: Source) -> Iterator[InputError]:
    """What takes the model to run, where nothing is known of how it does."""
    if not source.arch.free:
        return
    for step in recipe.passes:
        needs = step.params.needs()
        if step.params.effects().scheme is None or replace(needs, rounding=False) != Needs():
            yield InputError(
                f"{step.name} has to know how the model computes, which a map says; this one has "
                "none (map: none)",
                hint="without a map: rtn, fp8, nvfp4, mxfp4 or mxfp8 with inputs as they come",
            )
    if recipe.audit is not None and not recipe.audit.weights_only:
        yield InputError(
            "audit: tokens are not tried in a model without a map (map: none)",
            hint="audit: {weights_only: true}",
        )
    if recipe.evaluate is not None:
        yield InputError(
            "evaluate: a model without a map (map: none) cannot be run block by block",
            hint="evaluate what is written in a runtime that knows the model",
        )


def _evaluated(recipe: Recipe) -> dict[str, int]:
    """Tokens of the rows that evaluation reads, by key."""
    if recipe.evaluate is None:
        return {}
    lengths = {"evaluate.length": recipe.evaluate.length}
    if recipe.evaluate.passkey is not None:
        lengths["evaluate.passkey.lengths"] = max(recipe.evaluate.passkey.lengths)
    return lengths


def _past_calibration(recipe: Recipe) -> Iterator[InputError]:
    """Evaluation of texts that what a pass calibrates is not for."""
    for step in recipe.passes:
        longest = step.params.longest_text(recipe.calibration.length)
        for key, length in _evaluated(recipe).items():
            if longest is not None and length > longest:
                yield InputError(
                    f"{key}: rows of {length} tokens are longer than the {longest} that "
                    f"{step.name} calibrates its thresholds on",
                    hint=f"calibration: {{length: {length}}}, or shorter rows",
                )


def _too_long(recipe: Recipe, source: Source) -> Iterator[InputError]:
    """Rows that a model has no positions for: learned ones end, and rotary ones are not evaluated
    beyond what the model was made for."""
    positions = source.layout.sizes.positions
    if positions is None:
        return
    learned = source.arch.embedding.position is not None
    lengths = {}
    if learned and any(step.params.needs().stats != StatNeeds() for step in recipe.passes):
        lengths["calibration.length"] = recipe.calibration.length
    if recipe.calibration.select is not None:
        longest = recipe.calibration.looked_at[1]
        lengths["calibration.select.sufficiency.reference_length"] = longest
    if recipe.audit is not None and not recipe.audit.weights_only:
        lengths["audit.length"] = recipe.audit.length
    lengths |= _evaluated(recipe)
    for key, length in lengths.items():
        if length > positions:
            yield InputError(
                f"{key}: rows of {length} tokens, but the model has {positions} "
                f"{'learned ' if learned else ''}positions",
                hint=f"at most {positions}",
            )
