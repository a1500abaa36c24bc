"""Which kernel multiplies by a packed layer, and how its product is held against float64.

One entry for each kind of scheme. On a GPU the whole layer runs; on a CPU one seeded tile of it
runs in Triton's interpreter, and the whole layer through the kernel's plain reference.
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from compressor_kernels.linear.w4a16 import Int4Weight, w4a16, w4a16_ref
from torch import Tensor

from compressor.formats.compressed_tensors.layouts.pack_quantized import PackQuantized
from compressor.ir.scheme import Scheme
from compressor.numerics.chunks import row_chunks
from compressor.verify.kernels.layer import (
    EVERYTHING,
    SUMS,
    KernelCheck,
    Layer,
    Multiply,
    Product,
    Tile,
    operands,
)
from compressor.verify.kernels.low_bit import NVFP4, W4A8, W8A8
from compressor.verify.kernels.mx import MX
from compressor.verify.kernels.weight_only import WeightOnly

GPU_TOKENS = (1, 16, 64)
TILE_OUTPUTS, TILE_INPUTS = 32, 1024
WHOLE_ROWS = 128
"""Rows after which words, tiles and blocks of every format begin anew."""
INTERPRETER = (3, 7)
"""The oldest Triton whose interpreter runs these kernels."""


class W4A16(KernelCheck):
    """4-bit integers, float inputs: any int4 layout, re-laid to `pack-quantized` where it is not.

    Only words move in a re-layout: no code, zero point or scale changes.
    """

    name = "w4a16"

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> bool:
        spec = scheme.weight
        if spec is None or scheme.input is not None or (spec.element, spec.bits) != ("int", 4):
            return False
        if spec.second != "none" or spec.zero == "offset":
            return False
        if spec.strategy == "channel":
            return True
        size = spec.group_size or 0
        whole = size >= 8 and (128 % size == 0 or size % 128 == 0)
        return spec.strategy == "group" and whole

    def prepared(self, layer: Layer) -> Layer:
        if "weight_packed" in layer.tensors:
            return layer
        return layer.laid_out(PackQuantized().encode(layer.q, input=None, input_scale=None))

    def multiply(self, layer: Layer, tile: Tile, device: torch.device) -> Multiply:
        weight, size = self._operands(layer, tile, device), layer.q.spec.group_size
        half = self.half(layer)
        return lambda x: w4a16(x.to(half), **weight, group_size=size, out_dtype=torch.float32)

    def multiply_ref(self, layer: Layer, tile: Tile, seen: Tensor) -> Tensor:
        weight = self._operands(layer, tile, seen.device)
        return w4a16_ref(seen, **weight, group_size=layer.q.spec.group_size)

    def half(self, layer: Layer) -> torch.dtype:
        scales = layer.tensors["weight_scale"]
        return torch.float16 if scales.dtype == torch.float16 else torch.bfloat16

    def loss(self, layer: Layer, x: Tensor) -> float:
        # The kernel may round a scale, and then its product with a code, to the inputs' dtype.
        return 2 * torch.finfo(self.half(layer)).eps + SUMS

    def _operands(self, layer: Layer, tile: Tile, device: torch.device) -> dict[str, Any]:
        tensors, q = layer.tensors, layer.q
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        zeros = tensors.get("weight_zero_point")
        weight = Int4Weight(packed, scales, zeros, q.shape[1], q.spec.group_size)
        return operands(weight, tile, device)


CHECKS: tuple[KernelCheck, ...] = (W4A16(), W8A8(), NVFP4(), MX(), W4A8(), WeightOnly())
"""The first that holds a scheme multiplies by it: the last takes what the fast ones leave."""


@dataclass(frozen=True, slots=True)
class KernelResult:
    """One layer's product against float64.

    kernel  the kernel's name;  triton  whether the Triton code itself ran
    error   largest relative error of a product (RMS over its outputs);  problem  why it failed
    """

    kernel: str
    triton: bool
    error: float
    problem: str = ""


def kernel_for(scheme: Scheme, shape: tuple[int, int]) -> KernelCheck | None:
    """The kernel that multiplies by such weights, or None."""
    return next((check for check in CHECKS if check.holds(scheme, shape)), None)


def interpreter_runs() -> bool:
    """Whether Triton code runs on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def enable_interpreter() -> None:
    """Let Triton code run on the CPU in this process, where that works and can still be decided.

    Triton looks at the variable once, when it is imported. A process that may use a GPU leaves
    Triton to it. Interpreters before `INTERPRETER` stumble over loops with NumPy 2.4 and later.
    """
    if "triton" in sys.modules or torch.cuda.is_available() or _triton() < INTERPRETER:
        return
    os.environ["TRITON_INTERPRET"] = "1"


def _triton() -> tuple[int, ...]:
    """The first two numbers of Triton's version; zeros where it is not installed."""
    try:
        return tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return (0, 0)


def check_kernel(
    check: KernelCheck, layer: Layer, *, device: torch.device, seed: int
) -> KernelResult:
    """Run a layer's product as far as the device lets it, and compare with float64."""
    generator = torch.Generator(device).manual_seed(layer_seed(layer.name, seed))
    inputs = layer.weight.shape[1]
    products: list[Product] = []
    triton = device.type == "cuda" or interpreter_runs()
    if device.type == "cuda":
        layer = layer.to(device)
    layer = check.prepared(layer)
    if device.type == "cuda":
        for tokens in GPU_TOKENS:
            x = torch.randn(tokens, inputs, generator=generator, device=device)
            products.append(check.kernel(layer, x, EVERYTHING))
    else:
        if triton:
            tile = seeded_tile(layer, generator)
            columns = tile.columns.stop - tile.columns.start
            x = torch.randn(1, columns, generator=generator)
            products.append(check.kernel(layer, x, tile))
        products.append(_reference(check, layer, torch.randn(2, inputs, generator=generator)))
    judged = []
    for made in products:
        difference = (made.found.double() - made.expected).abs()
        scale = made.expected.square().mean().sqrt().clamp(min=1e-30)
        wrong = ~(difference <= made.bound)
        judged.append(torch.stack([difference.square().mean().sqrt() / scale, wrong.sum()]))
    # Asked once: each answer waits for the device.
    errors, wrongs = torch.stack(judged).T.tolist()
    problem = next(
        (_problem(check, made) for made, wrong in zip(products, wrongs, strict=True) if wrong), ""
    )
    return KernelResult(kernel=check.name, triton=triton, error=max(errors), problem=problem)


def _problem(check: KernelCheck, made: Product) -> str:
    """The first output that is beyond its bound, and how many are."""
    found = made.found.double()
    wrong = ~((found - made.expected).abs() <= made.bound)
    token, output = (int(i) for i in wrong.nonzero()[0])
    gives, should = float(found[token, output]), float(made.expected[token, output])
    return (
        f"{check.name} gives {gives:.6g} for an output that is {should:.6g} "
        f"({int(wrong.sum())} of {wrong.numel()} wrong)"
    )


def _reference(check: KernelCheck, layer: Layer, x: Tensor) -> Product:
    """The plain reference's product with a whole layer, some rows after others."""
    parts = [
        check.reference(layer, x, Tile(rows=rows, columns=slice(None)))
        for rows in row_chunks(layer.weight, multiple=WHOLE_ROWS)
    ]
    return Product(
        found=torch.cat([part.found for part in parts], -1),
        expected=torch.cat([part.expected for part in parts], -1),
        bound=torch.cat([part.bound for part in parts], -1),
    )


def seeded_tile(layer: Layer, generator: torch.Generator) -> Tile:
    """Up to TILE_OUTPUTS x TILE_INPUTS of a layer, at whole words and whole groups."""
    outputs, inputs = layer.weight.shape
    # Signs of 32 inputs are in a word.
    size = 32 if layer.codes is None else layer.codes.spec.group_size or inputs
    width = max(TILE_INPUTS // size, 1) * size
    row = _start(outputs, TILE_OUTPUTS, generator)
    column = _start(inputs, width, generator)
    return Tile(
        rows=slice(row, min(row + TILE_OUTPUTS, outputs)),
        columns=slice(column, min(column + width, inputs)),
    )


def _start(count: int, step: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, -(-count // step), (1,), generator=generator)) * step


def layer_seed(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "little")
