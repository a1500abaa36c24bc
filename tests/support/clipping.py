"""The published search of clipping bounds, which runs tokens."""

from torch import Tensor

from compressor.ir.qtensor import QuantSpec
from compressor.numerics.awq_clip import clip_group_size, search_clip


def search_clip_reference(
    weight: Tensor, inputs: Tensor, spec: QuantSpec, *, tokens: int = 512
) -> Tensor:
    """Bounds [O, groups] with the least error of each group's part of the output, over every
    (T // tokens)-th of the inputs [T, C]."""
    chosen = inputs[:: max(1, inputs.shape[0] // tokens)].to(weight.dtype)
    x = chosen.view(chosen.shape[0], -1, clip_group_size(weight, spec)).transpose(0, 1)

    def error(delta: Tensor) -> Tensor:
        return (delta.transpose(0, 1) @ x.transpose(1, 2)).square().mean(-1).t()

    return search_clip(weight, error, spec)[0]
