"""Check of the kernel that multiplies by the packed signs of a delta, on top of its base's
product."""

from collections.abc import Callable

import torch
from compressor_kernels.linear.bitdelta import delta_matmul, delta_matmul_ref
from torch import Tensor

from compressor.numerics.bitdelta import SCALES, SIGNS
from compressor.verify.kernels.layer import SUMS, KernelCheck, Layer, Multiply, Product, Tile

BASE = "base"
"""Under which a delta's layer has the weight of its base."""


class SignsOnBase(KernelCheck):
    """Signs as they are stored, 32 inputs of an output in a word. It holds no scheme of a
    checkpoint's own: a delta names it itself."""

    name = "delta_matmul"

    def multiply(self, layer: Layer, tile: Tile, device: torch.device) -> Multiply:
        return _multiply(layer, tile, device, delta_matmul)

    def kernel(self, layer: Layer, x: Tensor, tile: Tile) -> Product:
        return _product(layer, x, tile, self.multiply(layer, tile, x.device)(x))

    def reference(self, layer: Layer, x: Tensor, tile: Tile) -> Product:
        return _product(layer, x, tile, _multiply(layer, tile, x.device, delta_matmul_ref)(x))


def _multiply(
    layer: Layer, tile: Tile, device: torch.device, multiply: Callable[..., Tensor]
) -> Multiply:
    left, right, _ = tile.columns.indices(layer.weight.shape[1])
    base = layer.tensors[BASE][tile.rows, tile.columns].to(device, torch.float32)
    signs = layer.tensors[SIGNS][:, left // 32 : -(-right // 32), tile.rows].to(device)
    scales = layer.tensors[SCALES].to(device)
    parts = [
        (words[None].contiguous(), scale.reshape(1))
        for words, scale in zip(signs, scales, strict=True)
    ]

    def multiplied(x: Tensor) -> Tensor:
        y = (x @ base.mT)[None]
        for words, scale in parts:
            y = multiply(x[None], words, scale, base_out=y)
        return y[0]

    return multiplied


def _product(layer: Layer, x: Tensor, tile: Tile, found: Tensor) -> Product:
    base = layer.tensors[BASE][tile.rows, tile.columns].to(x.device, torch.float64)
    x, sizes = x.double(), base.abs() + layer.tensors[SCALES].abs().sum().double().to(x.device)
    weight = layer.dense(tile, x.device)
    bound = SUMS * (x.abs() @ sizes.mT) + 1e-30
    return Product(found=found, expected=x @ weight.mT, bound=bound)
