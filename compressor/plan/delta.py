"""What a run writes where a pass names a base: which tensors become deltas, which are left out."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compressor.checkpoint.delta.base import Base, locate_base
from compressor.checkpoint.delta.target import DeltaTarget
from compressor.checkpoint.manifest import read_manifest
from compressor.checkpoint.source import Source
from compressor.checkpoint.target import ModelTarget
from compressor.errors import CompressError, InputError
from compressor.ir.layout import Linear
from compressor.methods.base import get_pass
from compressor.plan.recipe import Recipe
from compressor.plan.unit_plan import PassPlan


def as_delta(
    target: ModelTarget,
    recipe: Recipe,
    passes: Sequence[PassPlan],
    base: Base | None,
    problems: list[CompressError],
    notes: list[str],
) -> ModelTarget:
    """The target as a delta where a pass names a base; what is wrong goes into `problems`.

    base  the base, where it has been found already
    """
    for plan in passes:
        only = plan.effects.only_format
        if only is not None and recipe.format != only:
            message = f"{plan.step.name} cannot be written as {recipe.format}"
            problems.append(InputError(message, hint=f"format: {only}"))
    found = next((plan for plan in passes if plan.needs.base is not None), None)
    if found is None:
        if recipe.format == "bitdelta":
            message = "format bitdelta holds what the pass bitdelta makes, and nothing else"
            problems.append(InputError(message))
        return target
    if len(passes) > 1:
        problems.append(
            InputError(
                f"{found.step.name} writes differences to the base: no other pass may change "
                "the weights",
                hint="run the others on the base first, and name what they wrote as the base",
            )
        )
    if base is None:
        try:
            base = locate_base(found.needs.base or "", fetch=False)
        except CompressError as error:
            problems.append(error)
            return target
    if base.record is None:
        notes.append("what the base has byte for byte is left out as well, so this is the most")
    moved = _moved_by(base.source.checkpoint.folder)
    if moved:
        notes.append(
            f"the base was made by {', '.join(moved)}, which also moves factors between weights: "
            "the fine-tune did not start from such weights, and their differences are large; "
            "rtn, gptq, fp8 and nvfp4 only round"
        )
    source = target.source
    linears = [x for x in source.layout.linears if x.name in found.names]
    misfits = [*_misfits(base.source, source, linears)]
    problems += misfits[:4]
    if len(misfits) > 4:
        problems.append(InputError(f"and {len(misfits) - 4} more linears like these"))
    entries = base.source.checkpoint.entries
    blocks = source.layout.blocks if found.effects.retrains_norms else ()
    retrained = {name for unit in blocks for name in unit.norm_tensors}
    stacked = [x for u in source.layout.units for part in u.stacks.values() for x in part]
    whole = {name for x in stacked for name in (x.weight_name, x.bias_name)}
    borrowed = frozenset(
        name
        for name in base.same - retrained - whole
        if target.float_dtype(name) == entries[name].spec.dtype
    )
    bits = {x.name: found.effects.delta_bits for x in linears if x.weight_name not in borrowed}
    fields = {f.name: getattr(target, f.name) for f in dataclasses.fields(target)}
    return DeltaTarget(**fields, base=base, bits=bits, borrowed=borrowed)


def _moved_by(folder: Path) -> list[str]:
    """Methods that a base of ours was made by and that change weights beyond rounding them."""
    try:
        manifest = read_manifest(folder) if folder.is_dir() else None
    except InputError:  # told where the base is read
        return []
    steps = (manifest.about.get("recipe") or {}).get("passes", ()) if manifest else ()
    return [name for step in steps for name, params in step.items() if _moves(name, params)]


def _moves(name: str, params: Any) -> bool:
    try:
        return get_pass(name).model_validate(params or {}).effects().stale
    except (InputError, ValidationError):  # of a release with other methods
        return False


def _misfits(base: Source, fine: Source, linears: Sequence[Linear]) -> Iterator[CompressError]:
    """Why the one cannot be what the other was fine-tuned from."""
    ours, theirs = fine.layout.model_type, base.layout.model_type
    if ours != theirs:
        message = f"the base is a {theirs}, the fine-tune a {ours}"
        yield InputError(message, hint="name the checkpoint that was fine-tuned")
        return
    known = {x.name: x for x in base.layout.linears if x.role != "lm_head" or not base.layout.tied}
    for linear in linears:
        other = known.get(linear.name)
        if other is None:
            yield InputError(
                f"the base has no {linear.name}",
                hint="name the checkpoint that was fine-tuned, or ignore this linear",
            )
        elif other.shape != linear.shape:
            why = " (the fine-tune's vocabulary was resized)" if linear.role == "lm_head" else ""
            yield InputError(
                f"{linear.name} is {list(linear.shape)} in the fine-tune and "
                f"{list(other.shape)} in the base{why}",
                hint=f"keep it in full precision with ignore: [{linear.name}]",
            )
