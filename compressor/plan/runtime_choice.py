"""The plan against runtimes' contracts: what would not load where the recipe says it goes, in
which form it would, and whether anything known loads it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from compressor.errors import CompressError, InputError
from compressor.formats.base import Format, ModelSchemes, get_format
from compressor.ir.layout import ModelLayout
from compressor.plan.recipe import Recipe
from compressor.plan.schemes import pass_schemes
from compressor.plan.unit_plan import PassPlan
from compressor.runtimes.contract import Runtime, load_contract, runtime_names
from compressor.runtimes.loads import APPLY, Written, loads, remarks, wants_names, written_form

FORMATS = ("compressed-tensors", "modelopt-fp8", "modelopt-nvfp4", "autoawq", "gptq")
"""Formats that are tried in this order where the recipe names none."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What contracts say of a plan.

    schemes   those of the plan, with the form of targets that the runtime wants
    refusals  why the runtime would not load it
    format    another format in which it would, where the recipe leaves that open
    notes     how it is known, or why the format is another
    """

    schemes: ModelSchemes
    refusals: tuple[InputError, ...] = ()
    format: str | None = None
    notes: tuple[str, ...] = ()


def settle(
    recipe: Recipe,
    layout: ModelLayout,
    passes: Sequence[PassPlan],
    fmt: Format,
    schemes: ModelSchemes,
    dtype: torch.dtype,
) -> Settled:
    """Hold what is planned against the recipe's runtime, or where it names none against all that
    are known."""
    tied = layout.tied is not None and not recipe.untie
    written = _planned(fmt, layout, schemes, dtype=dtype, tied=tied)
    runtime = recipe.runtime
    if runtime is None:
        return Settled(schemes, notes=_nowhere(written))
    if wants_names(runtime, groups=written.groups, experts=written.experts):
        schemes, written = replace(schemes, named=True), replace(written, classes=())
    refusals = tuple(loads(runtime, written))
    if not refusals:
        return Settled(schemes, notes=tuple(remarks(runtime, written)))
    other = _loaded_format(recipe, layout, passes, schemes, dtype=dtype, tied=tied)
    if other is not None and "format" not in recipe.model_fields_set:
        why = f"written as {other}: {refusals[0].message}"
        return Settled(schemes, format=other, notes=(why,))
    return Settled(schemes, tuple(_refusal(x, other) for x in refusals))


def _refusal(error: InputError, other: str | None) -> InputError:
    """What a plan says where the runtime stands against it."""
    instead = [] if other is None else [f"format: {other} would load as it is"]
    hint = "; ".join(filter(None, [*instead, error.hint]))
    return InputError(f"runtime {error.message}", hint=hint or None)


def _loaded_format(
    recipe: Recipe,
    layout: ModelLayout,
    passes: Sequence[PassPlan],
    schemes: ModelSchemes,
    *,
    dtype: torch.dtype,
    tied: bool,
) -> str | None:
    """The first format in which the recipe's runtime loads the same schemes."""
    assert recipe.runtime is not None
    for name in FORMATS:
        wrong: list[CompressError] = []
        other = get_format(name)
        model = other.model_dtype(dtype)
        linears = pass_schemes(passes, layout, other, model, wrong)
        if wrong:
            continue
        moved = replace(schemes, linears=linears)
        try:
            found = _planned(other, layout, moved, dtype=model, tied=tied)
        except InputError:
            continue
        if not loads(recipe.runtime, found):
            return name
    return None


def _planned(
    fmt: Format, layout: ModelLayout, schemes: ModelSchemes, *, dtype: torch.dtype, tied: bool
) -> Written:
    tensors = {
        x.name: fmt.layout(scheme.weight, x.shape, model_dtype=dtype, input=scheme.input)
        for x in layout.linears
        if (scheme := schemes.linears[x.name]).weight is not None
    }
    return written_form(fmt, layout, schemes, tensors, config=fmt.config(schemes), tied=tied)


def _nowhere(written: Written) -> tuple[str, ...]:
    """That nothing which serves models loads it, and why; nothing where something does, or where
    it is a difference to be applied first."""
    reasons, readers = [], []
    for name in runtime_names():
        contract = load_contract(name)
        refused = loads(Runtime(name=name, version=contract.versions[-1]), written)
        if (not refused and contract.serves) or written.format in APPLY:
            return ()
        if refused:
            reasons.append(refused[0].message)
        else:
            readers.append(contract.title)
    who = f"only {' and '.join(readers)} loads" if readers else "nothing loads"
    return (f"of the runtimes that are known here {who} the result: {'; '.join(reasons)}",)
