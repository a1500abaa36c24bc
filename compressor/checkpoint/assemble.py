"""A unit from its tensors on disk."""

import math
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from compressor.errors import under
from compressor.formats.base import Format, ModelSchemes
from compressor.ir.layout import Linear, UnitLayout
from compressor.ir.qtensor import QTensor, QuantSpec
from compressor.ir.unit import Unit
from compressor.ranks.ranks import ALONE, Ranks


def assembled(
    unit: UnitLayout,
    tensors: Mapping[str, Tensor],
    format: Format,
    schemes: ModelSchemes,
    stored: Callable[[Linear], Iterable[str]],
    *,
    coded: Mapping[str, QTensor] | None = None,
    ranks: Ranks = ALONE,
) -> Unit:
    """The unit that its tensors on disk stand for; a weight alone is floats.

    stored  names, local to a coded linear, of those that hold its weight and input scale
    coded   weights by the name of their linear, which are not decoded again; their tensors may be
            missing, and scales of their inputs are not read
    ranks   that have all of the tensors, and divide the decoding
    Raises InputError where a format cannot read them.
    """
    raw, known = dict(tensors), coded or {}
    packed: list[tuple[Linear, QuantSpec, dict[str, Tensor]]] = []
    kept: dict[str, QTensor] = {}
    for linear in unit.linears:
        spec = schemes.linears[linear.name].weight
        leaves = ["weight"] if spec is None else list(stored(linear))
        if linear.beside and not any(f"{linear.name}.{leaf}" in raw for leaf in leaves):
            continue  # what is carried over was not asked for
        if linear.name in known and leaves != ["weight"]:
            kept[linear.name] = known[linear.name]
            for leaf in leaves:
                raw.pop(f"{linear.name}.{leaf}", None)
        elif spec is not None and leaves != ["weight"]:
            local = {leaf: raw.pop(f"{linear.name}.{leaf}") for leaf in leaves}
            packed.append((linear, spec, local))

    def decoded(of: tuple[Linear, QuantSpec, dict[str, Tensor]]) -> tuple[QTensor, Tensor | None]:
        linear, spec, local = of
        with under(linear.name):
            return format.decode(local, spec), format.input_scale(local)

    made = ranks.each(packed, decoded, lambda of: math.prod(of[0].shape)) if packed else []
    found = {x.name: values for (x, _, _), values in zip(packed, made, strict=True)}
    own = {*unit.tensors, *(x.weight_name for x in unit.linears if not x.beside)}
    return Unit(
        layout=unit,
        tensors={name: tensor for name, tensor in raw.items() if name in own},
        quantized={**kept, **{name: q for name, (q, _) in found.items()}},
        extra={name: tensor for name, tensor in raw.items() if name not in own},
        input_scales={name: scale for name, (_, scale) in found.items() if scale is not None},
    )
