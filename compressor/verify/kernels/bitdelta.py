"""Check of the kernel that multiplies by the packed signs of a delta, on top of its base's
product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compressor.numerics.bitdelta import SCALES, SIGNS
from compressor.verify.kernels.layer import KernelCheck, Layer, Product, Tile
from compressor.verify.kernels.low_bit import SUMS

BASE = "base"
"""Under which a delta's layer has the weight of its base."""


class SignsOnBase(KernelCheck):
    """Signs as they are stored, 32 inputs of an output in a word. It holds no scheme of a
    checkpoint's own: a delta names it itself."""

    name = "delta_matmul"

    def kernel(self, layer: Layer, x: Tensor, tile: Tile) -> Product:
        from compressor_kernels.linear.bitdelta import delta_matmul

        return _product(layer, x, tile, delta_matmul)

    def reference(self, layer: Layer, x: Tensor, tile: Tile) -> Product:
        from compressor_kernels.linear.bitdelta import delta_matmul_ref

        return _product(layer, x, tile, delta_matmul_ref)


def _product(layer: Layer, x: Tensor, tile: Tile, multiply: Callable[..., Tensor]) -> Product:
    left, right, _ = tile.columns.indices(layer.weight.shape[1])
    base = layer.tensors[BASE][tile.rows, tile.columns].to(x.device, torch.float32)
    signs = layer.tensors[SIGNS][:, left // 32 : -(-right // 32), tile.rows].to(x.device)
    scales = layer.tensors[SCALES].to(x.device)
    y = (x @ base.mT)[None]
    for words, scale in zip(signs, scales, strict=True):
        y = multiply(x[None], words[None].contiguous(), scale.reshape(1), base_out=y)
    x, sizes = x.double(), base.double().abs() + scales.abs().sum().double()
    weight = layer.dense(tile, x.device)
    bound = SUMS * (x.abs() @ sizes.mT) + 1e-30
    return Product(found=y[0], expected=x @ weight.mT, bound=bound)
