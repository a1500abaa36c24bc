"""Between a unit and its tensors on disk, as the plan says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.unit import Unit
from compressor.plan.plan import Plan
from compressor.plan.unit_plan import UnitPlan


def encode_unit(plan: Plan, unit: UnitPlan, made: Unit) -> dict[str, Tensor]:
    """A unit's output tensors: name → tensor, exactly those of the plan.

    Raises InputError where a float tensor leaves the range of its dtype on disk.
    """
    outputs: dict[str, Tensor] = {}
    for linear in unit.layout.linears:
        scheme = plan.schemes.linears[linear.name]
        if scheme.weight is not None:
            q = made.quantized[linear.name]
            assert q.spec == scheme.weight, f"{linear.name}: planned {scheme.weight}, made {q.spec}"
            local = plan.format.encode(
                q,
                model_dtype=plan.dtype,
                input=scheme.input,
                input_scale=made.input_scales.get(linear.name),
            )
            outputs.update({f"{linear.name}.{leaf}": tensor for leaf, tensor in local.items()})
    kv = plan.schemes.kv
    for attention, (keys, values) in made.kv_scales.items():
        assert kv is not None, f"{attention}: scales of a KV cache that no pass quantizes"
        outputs |= plan.format.kv_tensors(
            kv, attention, k_scale=keys, v_scale=values, model_dtype=plan.dtype
        )
    floats = {**made.tensors, **made.extra}
    for stack in unit.layout.stacks.keys() & unit.outputs.keys():
        floats |= plan.source.arch.runtime.restacked(unit.layout, stack, made.tensors)[1]
    narrow = {}
    for name, spec in unit.outputs.items():
        if name not in outputs:
            # A clone where nothing is cast: what is written later must not be changed before.
            outputs[name] = floats[name].to(spec.dtype)
            if spec.dtype == torch.float16:
                narrow[name] = torch.isfinite(outputs[name]).all()
    lost = [name for name, good in narrow.items() if not bool(good)]
    if lost:
        raise InputError(
            f"{lost[0]} holds values beyond the range of float16",
            hint="write bfloat16 (dtype: bfloat16), or use a format that stores it",
        )
    return {name: outputs[name] for name in unit.outputs}


def decode_unit(plan: Plan, unit: UnitPlan, outputs: Mapping[str, Tensor]) -> Unit:
    """The unit that written tensors stand for; the inverse of `encode_unit`."""
    floats = dict(outputs)
    quantized = {}
    for linear in unit.layout.linears:
        for name, ref in (
            (linear.weight_name, linear.tensor),
            (linear.bias_name, linear.bias_tensor),
        ):
            if ref is not None and ref.index is not None and ref.name in outputs:
                floats[name] = ref.read(outputs[ref.name])
    for linear in unit.layout.linears:
        for ref in (linear.tensor, linear.bias_tensor):
            if ref is not None and ref.index is not None:
                floats.pop(ref.name, None)
    for linear in unit.layout.linears:
        scheme = plan.schemes.linears[linear.name]
        if scheme.weight is not None:
            local = plan.format.layout(
                scheme.weight, linear.shape, model_dtype=plan.dtype, input=scheme.input
            )
            tensors = {leaf: floats.pop(f"{linear.name}.{leaf}") for leaf in local}
            quantized[linear.name] = plan.format.decode(tensors, scheme.weight)
    own = {*unit.layout.tensors, *(linear.weight_name for linear in unit.layout.linears)}
    return Unit(
        layout=unit.layout,
        tensors={name: tensor for name, tensor in floats.items() if name in own},
        quantized=quantized,
        extra={name: tensor for name, tensor in floats.items() if name not in own},
    )
