"""Coded linears of a unit as the tensors that stand for them on disk."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from compressor.formats.base import Format, ModelSchemes
from compressor.formats.shared.checks import Look, require
from compressor.ir.layout import Linear
from compressor.ir.qtensor import QTensor
from compressor.ir.same_shape import Linears, groups_of_experts, of_one_shape
from compressor.ir.tensor import TensorShape
from compressor.ir.unit import Unit
from compressor.ranks.ranks import Ranks


def packed(
    unit: Unit,
    coded: Iterable[Linear],
    format: Format,
    schemes: ModelSchemes,
    leaves: Callable[[Linear], Mapping[str, TensorShape]],
    *,
    dtype: torch.dtype,
    stackable: Callable[[Linear], bool],
    whole: bool,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Tensors of coded linears by full name: those that this rank makes, or with `whole` all.

    leaves     of a linear: names, local to it, and shapes of what stands for its weight
    dtype      of the model
    stackable  whether experts of a linear's shape may be packed one above the other
    ranks      that divide the work. All linears of an expert are one rank's, since they follow one
               another in a file
    """

    # What has no row for each of a weight's follows from its shape.
    of_shape: dict[Hashable, dict[str, Tensor]] = {}

    def kind(linear: Linear) -> Hashable:
        alike = linear.expert is not None and stackable(linear)
        return schemes.linears[linear.name] if alike else linear.name

    def encoded(linears: Linears, looks: list[Look]) -> dict[str, Tensor]:
        """Tensors of linears of one shape, one above the other where there is one a row. Of codes
        that wait in main memory they wait there, too."""
        first, every = linears[0], [unit.quantized[x.name] for x in linears]
        home = every[0].device
        if unit.device is not None:
            every = [q.to(unit.device) for q in every]
        scheme = schemes.linears[first.name]
        for q in every:
            assert q.spec == scheme.weight, f"{first.name}: not {scheme.weight}, but {q.spec}"

        def encode(q: QTensor) -> dict[str, Tensor]:
            scale = unit.input_scales.get(first.name)
            return format.encode(
                q, model_dtype=dtype, input=scheme.input, input_scale=scale, looks=looks
            )

        def there(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            # A shape that is on the CPU goes to a GPU without a wait for it.
            away = home.type != "cpu"
            return {name: tensor.to(home, non_blocking=away) for name, tensor in tensors.items()}

        if len(linears) == 1:
            return there(encode(every[0]))
        together, alike = encode(QTensor.above(every)), leaves(first)
        apart = {n for n, tensor in together.items() if tensor.shape != alike[n].shape}
        found, kind = {n: t for n, t in together.items() if n in apart}, (scheme, first.shape)
        if found.keys() != together.keys():
            if kind not in of_shape:
                one = encode(every[0])
                of_shape[kind] = {n: t for n, t in one.items() if n not in apart}
            found |= of_shape[kind]
        return there(found)

    def made(groups: Iterable[Sequence[Linears]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        looks: list[Look] = []
        for linears in (linears for stacks in groups for linears in stacks):
            alike = leaves(linears[0])
            for leaf, tensor in encoded(linears, looks).items():
                parts: Sequence[Tensor] = [tensor] * len(linears)
                if tensor.shape != alike[leaf].shape:
                    parts = tensor.chunk(len(linears))
                found |= {f"{x.name}.{leaf}": p for x, p in zip(linears, parts, strict=True)}
        require(looks)
        return found

    def work(stacks: Sequence[Linears]) -> float:
        return float(sum(math.prod(x.shape) for linears in stacks for x in linears))

    coded = list(coded)
    number = {e: i for i, group in enumerate(groups_of_experts(coded)) for e in group}
    groups: dict[Hashable, list[Linears]] = {}
    for linears in of_one_shape(coded, kind):
        name, expert = linears[0].name, linears[0].expert
        groups.setdefault(name if expert is None else number[expert], []).append(linears)
    every = list(groups.values())
    if whole:
        parts = ranks.each(every, lambda stacks: made([stacks]), work)
        return {name: tensor for part in parts for name, tensor in part.items()}
    # What one rank has alone is its own.
    theirs = [unit.quantized[stacks[0][0].name].codes.is_meta for stacks in every]
    alone = [any(theirs) and stacks[0][0].expert is not None for stacks in every]
    mine = ranks.mine([s for s, one in zip(every, alone, strict=True) if not one], work)
    for stacks, one, other in zip(every, alone, theirs, strict=True):
        mine += [stacks] if one and not other else []
    return made(mine)
