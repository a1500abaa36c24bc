"""How long kernels take for the linears of a block, on a GPU."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from compressor.ir.layout import UnitLayout
from compressor.verify.kernels.layer import EVERYTHING, Layer, Multiply
from compressor.verify.subject import Subject

TOKENS = (1, 16, 256, 2048)
"""Rows of inputs: one token at a time, a few, a prompt."""

Times = dict[str, dict[int, float]]
"""Role of a linear → tokens → microseconds."""


@torch.no_grad()
def block_times(subject: Subject, unit: UnitLayout, tensors: Mapping[str, Tensor]) -> Times:
    """Microseconds of one linear of each role, rounding of inputs included; floats through
    PyTorch. A packed linear without a kernel is left out. Weights that fit into the GPU's cache
    stay there between calls.

    tensors  of the unit by their full names
    """
    found: Times = {}
    roles = {x.role: x for x in reversed(unit.linears)}
    wanted = {x.name for x in roles.values()}
    packed = {x.name for x in subject.packed(unit)}
    for linear in roles.values():
        if linear.name not in packed:
            weight = tensors[linear.weight_name].to(subject.device)
            found[linear.role] = _times(partial(_plain, weight), weight)
    for linear, layer in subject.layers(unit, tensors, subject.on_device(tensors)):
        check = subject.kernel(linear)
        if linear.name in wanted and check is not None and isinstance(layer, Layer):
            layer = check.prepared(layer.to(subject.device))
            multiply = check.multiply(layer, EVERYTHING, subject.device)
            found[linear.role] = _times(multiply, layer.weight)
    return {role: found[role] for role in sorted(found)}


def _plain(weight: Tensor, x: Tensor) -> Tensor:
    return nn.functional.linear(x.to(weight), weight)


def _times(multiply: Multiply, weight: Tensor) -> dict[int, float]:
    """Medians of calls in CUDA graphs."""
    from triton.testing import do_bench_cudagraph

    found = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, weight.shape[1], device=weight.device)
        milliseconds = do_bench_cudagraph(partial(multiply, x), rep=5, return_mode="median")
        found[tokens] = 1e3 * float(milliseconds)
    return found
