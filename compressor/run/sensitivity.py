"""Measures how much each group of linears costs at each number of bits, block by block.

A group is what must have one scheme: q/k/v, gate and up, all experts of a block, or one linear.
Its error is what this group alone costs where it is quantized: the KL divergence of the model's
predictions that the change of the hidden states after its block makes in second order, or the
relative squared change itself, averaged over calibration tokens. The recipe's transforms come
first, as in a run; inputs are those of the unquantized model, so that groups are measured
independently.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.ir.layout import Linear, UnitLayout, is_bias, weight_name
from compressor.ir.unit import Unit
from compressor.methods.base import ModelPass
from compressor.plan.plan import Plan, make_plan
from compressor.plan.recipe import make_recipe
from compressor.plan.unit_plan import Observable, UnitPlan
from compressor.run.allocate import Group, Option, Sensitivity, Way, split_bits
from compressor.run.apply import apply_passes
from compressor.run.observers import observer
from compressor.runner.activations import Activations
from compressor.runner.block_runner import Block
from compressor.runner.end_gradients import end_gradients
from compressor.runner.observe import Observation
from compressor.runner.simulate import StoredInput, quantized_inputs
from compressor.runner.source_model import SourceModel
from compressor.runner.stream import Stream
from compressor.runner.sweep import Execution, Step, sweep

MEASURE = "relative squared change of the hidden states after the block, mean over tokens"
KL = "KL divergence of the predictions in second order, nats for each token"


def plans_of_bits(
    recipe: Mapping[str, Any],
    source: Source,
    bits: Sequence[int],
    forms: Sequence[str] = (),
    groups: Sequence[int] = (),
) -> dict[Way, Plan]:
    """The recipe planned with its quantizer at each number of bits, in ascending order, in groups
    of each size, and with other forms in its place.

    Raises Problems or InputError where a plan fails or there is no one quantizer with `bits`.
    """
    before, quantizer = split_bits(recipe["passes"])
    ((name, given),) = quantizer.items()
    # Inputs are the unquantized model's: there is nothing to correct.
    params = {key: value for key, value in given.items() if key != "correction"}
    sizes: Sequence[int | None] = tuple(dict.fromkeys(groups)) or (None,)
    ways = [Way(number, size) for number in sorted(set(bits)) for size in sizes]
    ways += [Way(form=form) for form in dict.fromkeys(forms)]
    plans: dict[Way, Plan] = {}
    for way in ways:
        entry = way.entry({name: params})
        data = {**recipe, "passes": [*before, entry], "propagate": "original"}
        plan = make_plan(make_recipe(data), source)
        for step in plan.passes:
            if isinstance(step.step.params, ModelPass) and step.effects.works_on != "none":
                raise InputError(
                    f"{step.step.name} changes weights by what it learns from the whole model, "
                    "which is not done here",
                    hint="leave it out of the recipe that is measured",
                )
        own = {linear.name for linear in source.layout.head.linears}
        heads = [n for n in plan.passes[-1].names if n in own]
        if heads:
            raise InputError(
                f"{heads[0]} has no block to be measured in", hint="leave it in `ignore`"
            )
        plans[way] = plan
    return plans


def measure_sensitivity(
    recipe: Mapping[str, Any],
    source: Source,
    bits: Sequence[int],
    ids: Tensor,
    *,
    device: torch.device,
    batch: int,
    forms: Sequence[str] = (),
    groups: Sequence[int] = (),
    weighted: bool = False,
    activations: Activations | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Sensitivity:
    """Every group's error at each number of bits, in other forms, and unquantized.

    recipe    as plain data, with exactly one quantizer that has `bits`
    forms     of `FORMS`
    groups    sizes of integers' groups, in place of the recipe's
    weighted  errors are KL divergences, for which the whole model is in memory once
    ids       calibration tokens [rows, length]
    activations  where hidden states of the source are kept
    progress  called with a unit's name, how many are done, and how many there are
    """
    plans = plans_of_bits(recipe, source, bits, forms, groups)
    plan = next(iter(plans.values()))
    model = SourceModel(
        source, device=device, dtype=plan.compute_dtype(device), activations=activations
    )
    execution = Execution(batch, offload=False)
    found: list[Group] = []
    gradients = end_gradients(model, ids, seed=plan.recipe.seed) if weighted else None
    for step in sweep(model, ids, execution=execution):
        own = None if gradients is None else gradients[step.layout.index]
        found += _measure_block(plans, step, own)
        progress(step.layout.name, step.index, len(source.layout.blocks))
    return Sensitivity(
        recipe=dict(recipe),
        measure=KL if weighted else MEASURE,
        tokens=ids.numel(),
        groups=tuple(found),
    )


def _measure_block(plans: Mapping[Way, Plan], step: Step, gradients: Tensor | None) -> list[Group]:
    """The groups of one block, which has run afterwards."""
    any_plan = next(iter(plans.values()))
    entering, left = step.stream, step.stream.like()
    step.run(into=left)
    index, layout, raw = step.index, step.layout, step.take()
    device = step.model.device
    start = Unit(
        layout=layout,
        tensors={k: v.to(device, torch.float32) for k, v in raw.dequantized().items()},
        extra=raw.extra,
    )
    wanted = groups_of(layout, any_plan.passes[-1].names)
    options: list[list[Option]] = [[] for _ in wanted]
    with step.loaded(start.tensors) as block:
        watch = observer(step, block, all_experts=any_plan.recipe.calibration.all_experts)

        def look(current: Unit, changed: bool, needs: Observable) -> Observation:
            return watch(current, True, needs)  # the block has weights of what was tried before

        for way, plan in plans.items():
            unit = plan.units[index]
            if not wanted:
                break
            last = len(unit.steps) - 1
            first = replace(unit, steps=unit.steps[:last], seen=unit.seen[:last])
            second = replace(unit, steps=unit.steps[last:], seen=unit.seen[last:])
            floats, _ = apply_passes(plan, index, first, start, observe=look, learned={})
            rounded, _ = apply_passes(plan, index, second, floats, observe=look, learned={})
            for number, linears in enumerate(wanted):
                error = _error(step, block, plan, linears, floats, rounded, left, gradients)
                options[number].append(
                    Option(
                        **way._asdict(),
                        bits_per_weight=bits_per_weight(unit, linears),
                        error=error,
                    )
                )
    stored = any_plan.target.dtype.itemsize * 8
    groups = [
        Group(
            linears=tuple(linear.name for linear in linears),
            weights=_weights(linears),
            options=(*found, Option(bits=None, bits_per_weight=stored, error=0.0)),
        )
        for linears, found in zip(wanted, options, strict=True)
    ]
    entering.take(left)
    return groups


def groups_of(unit: UnitLayout, names: frozenset[str]) -> list[list[Linear]]:
    """The unit's linears among `names`, by what must have one scheme, in order."""
    groups: dict[str, list[Linear]] = {}
    for linear in unit.linears:
        if linear.name in names:
            groups.setdefault(linear.fused or linear.name, []).append(linear)
    return list(groups.values())


def bits_per_weight(unit: UnitPlan, linears: Sequence[Linear]) -> float:
    """What the planned tensors of some linears take, without their biases."""
    modules = {linear.name for linear in linears}
    size = sum(
        shape.nbytes
        for name, shape in unit.outputs.items()
        if name.rpartition(".")[0] in modules and not is_bias(name)
    )
    return 8 * size / _weights(linears)


def _weights(linears: Sequence[Linear]) -> int:
    return sum(linear.out_features * linear.in_features for linear in linears)


def _error(
    step: Step,
    block: Block,
    plan: Plan,
    linears: Sequence[Linear],
    floats: Unit,
    rounded: Unit,
    left: Stream,
    gradients: Tensor | None,
) -> float:
    """What the change of a block's outputs `left` costs where only some linears are quantized."""
    names = {linear.name for linear in linears}
    own = {weight_name(n): q.dequantize() for n, q in rounded.quantized.items() if n in names}
    block.load({**floats.dequantized(), **own})
    inputs = {
        name: StoredInput(spec, rounded.input_scales.get(name))
        for name in names
        if (spec := plan.schemes.linears[name].input) is not None
    }
    # States of a row's first token are by far the largest: a change there is not small.
    first = 0 if gradients is None else min(1, left.hidden.shape[1] - 1)
    total = 0.0
    with quantized_inputs(block, inputs):
        for start, stop, out in step.outputs(step.stream):
            wanted = left.read(start, stop).float()
            off = out.float() - wanted
            if gradients is None:
                size = wanted.square().sum(-1).clamp(min=1e-30)
                cost = off.square().sum(-1) / size
            else:
                weigh = gradients[start:stop].to(off.device).float()
                cost = at_most_a_nat((off * weigh).sum(-1).square() / 2)[:, first:]
            total += float(cost.sum(dtype=torch.float64))
    return total / (left.hidden.shape[0] * (left.hidden.shape[1] - first))


def at_most_a_nat(divergence: Tensor) -> Tensor:
    """KL divergences in second order, [..., tokens], of which none counts as more than a nat.

    Second order is that of small changes, and gives others any number. The groups of SmolLM2 that
    got most lie where the state of a row's first token grows to 800 and falls again (blocks 2 and
    9): with it, and unbounded, 3 bits everywhere were foretold to cost 7.7 nats a token, and
    without it, and bounded, 0.259; 0.260 are measured.
    """
    return divergence / (1 + divergence)
