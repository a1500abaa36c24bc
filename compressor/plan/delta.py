"""What a run writes where a pass names a base: which tensors become deltas, which are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from compressor.checkpoint.delta.base import BASE_NAME, Base, delta_shapes, locate_base
from compressor.checkpoint.manifest import read_manifest
from compressor.checkpoint.source import Source
from compressor.errors import CompressError, InputError
from compressor.ir.layout import Linear, UnitLayout
from compressor.ir.tensor import TensorShape
from compressor.methods.base import get_pass
from compressor.numerics.bitdelta import SCALES, SIGNS, SignDelta
from compressor.plan.recipe import Recipe
from compressor.plan.unit_plan import PassPlan, float_dtype


@dataclass(frozen=True, slots=True)
class DeltaPlan:
    """What a run writes of a fine-tune.

    bits      module path of a linear → signs for each of its weights
    borrowed  tensors that are not written, because the base has the same
    """

    base: Base
    bits: Mapping[str, int]
    borrowed: frozenset[str] = field(default=frozenset())

    def outputs(
        self, unit: UnitLayout, planned: Mapping[str, TensorShape]
    ) -> dict[str, TensorShape]:
        """A unit's tensors on disk, where `planned` are those of the dense fine-tune."""
        coded = {x.weight_name: x for x in unit.linears if x.name in self.bits}
        found: dict[str, TensorShape] = {}
        for name, spec in planned.items():
            if name in coded:
                found |= delta_shapes(coded[name], self.bits[coded[name].name])
            elif name not in self.borrowed:
                found[name] = spec
        return found

    def weights(self, unit: UnitLayout) -> dict[str, Tensor]:
        """The base's weights of a unit's deltas, on the CPU."""
        return self.base.weights(x.name for x in unit.linears if x.name in self.bits)

    def restored(
        self, unit: UnitLayout, outputs: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """A unit's weights as they are read back from its written tensors; `dtype` the model's."""
        coded = {x.weight_name: x for x in unit.linears if x.name in self.bits}
        weights = self.weights(unit)
        found: dict[str, Tensor] = {}
        for name in unit.tensors:
            if name in coded:
                path = coded[name].name
                signs, scales = outputs[f"{path}.{SIGNS}"], outputs[f"{path}.{SCALES}"]
                delta = SignDelta(signs, scales, coded[name].in_features)
                found[name] = delta.merged(weights[name].to(signs.device), dtype)
            elif name in self.borrowed:
                found |= self.base.source.checkpoint.read([name])
            else:
                found[name] = outputs[name]
        return found

    def base_bytes(self, unit: UnitLayout) -> int:
        """Bytes of those weights, in the model's dtype."""
        size = self.base.source.checkpoint.dtype.itemsize
        return sum(
            size * x.out_features * x.in_features for x in unit.linears if x.name in self.bits
        )

    def config(self) -> dict[str, Any]:
        """What config.json says of the delta."""
        record = self.base.record
        counts = sorted(set(self.bits.values()))
        return {
            "bits": counts[0] if counts else 0,
            "base": {
                **self.base.identity,
                "fingerprint": record.fingerprint if record else None,
            },
            "borrowed": sorted(self.borrowed),
        }

    def files(self) -> dict[str, Any]:
        """JSON files beside config.json."""
        assert self.base.record is not None, "the base has not been read"
        return {BASE_NAME: self.base.record.to_json()}


def plan_delta(
    recipe: Recipe,
    source: Source,
    passes: Sequence[PassPlan],
    dtype: torch.dtype,
    base: Base | None,
    problems: list[CompressError],
    notes: list[str],
) -> DeltaPlan | None:
    """The plan where a pass names a base, else None; what is wrong goes into `problems`.

    dtype  that of the written model;  base  the base, where it has been found already
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
        return None
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
            return None
    if base.record is None:
        notes.append("what the base has byte for byte is left out as well, so this is the most")
    moved = _moved_by(base.source.checkpoint.folder)
    if moved:
        notes.append(
            f"the base was made by {', '.join(moved)}, which also moves factors between weights: "
            "the fine-tune did not start from such weights, and their differences are large; "
            "rtn, gptq, fp8 and nvfp4 only round"
        )
    linears = [x for x in source.layout.linears if x.name in found.names]
    problems.extend(_misfits(base.source, source, linears))
    dtypes = {n: float_dtype(n, source, recipe, dtype) for n in source.checkpoint.entries}
    entries = base.source.checkpoint.entries
    blocks = source.layout.blocks if found.effects.retrains_norms else ()
    retrained = {name for unit in blocks for name in unit.norm_tensors}
    borrowed = frozenset(
        n for n in base.same if dtypes.get(n) == entries[n].spec.dtype and n not in retrained
    )
    bits = found.effects.delta_bits
    coded = {x.name: bits for x in linears if x.weight_name not in borrowed}
    return DeltaPlan(base, coded, borrowed)


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


def _misfits(base: Source, fine: Source, linears: Sequence[Linear]) -> list[CompressError]:
    """Why the one cannot be what the other was fine-tuned from."""
    ours, theirs = fine.layout.model_type, base.layout.model_type
    if ours != theirs:
        message = f"the base is a {theirs}, the fine-tune a {ours}"
        return [InputError(message, hint="name the checkpoint that was fine-tuned")]
    known = {x.name: x for x in base.layout.linears if x.role != "lm_head" or not base.layout.tied}
    problems: list[CompressError] = []
    for linear in linears:
        other = known.get(linear.name)
        if other is None:
            problems.append(
                InputError(
                    f"the base has no {linear.name}",
                    hint="name the checkpoint that was fine-tuned, or ignore this linear",
                )
            )
        elif other.shape != linear.shape:
            why = " (the fine-tune's vocabulary was resized)" if linear.role == "lm_head" else ""
            problems.append(
                InputError(
                    f"{linear.name} is {list(linear.shape)} in the fine-tune and "
                    f"{list(other.shape)} in the base{why}",
                    hint=f"keep it in full precision with ignore: [{linear.name}]",
                )
            )
    if len(problems) > 4:
        more = InputError(f"and {len(problems) - 4} more linears like these")
        problems = [*problems[:4], more]
    return problems
