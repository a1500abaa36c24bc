"""Kernels of packed layers, compiled side by side before the first layer is checked.

A kernel is made for the sides of a linear and the number of tokens, so a checkpoint of one shape of
block needs a dozen. Each takes most of a second of one processor, and none needs a weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from compressor.formats.base import Format, ModelSchemes
from compressor.ir.layout import Linear
from compressor.ir.scheme import Scheme
from compressor.numerics import quantize
from compressor.verify.kernels.check import GPU_TOKENS, kernel_for
from compressor.verify.kernels.layer import EVERYTHING, KernelCheck, Layer

THREADS = 6
"""More would not be faster: much of the compiler runs one thread at a time."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which kernels, for whoever is to compile them.

    layers  scheme and shape of linears: the packed ones count, each kind once
    format, dtype  of the checkpoint
    """

    layers: tuple[tuple[Scheme, tuple[int, int]], ...]
    format: Format
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls,
        linears: Iterable[Linear],
        schemes: ModelSchemes,
        *,
        format: Format,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Wanted:
        kinds = dict.fromkeys((schemes.linears[x.name], x.shape) for x in linears)
        return cls(tuple(kind for kind in kinds if kind[0].weight), format, dtype, device)


class CompiledAhead:
    """The kernels on their way."""

    def __init__(self, wanted: Wanted) -> None:
        self.format, self.dtype, self.device = wanted.format, wanted.dtype, wanted.device
        self.coming: list[Future[None]] = []
        if self.device.type != "cuda":
            return
        with contextlib.suppress(ImportError):
            # Once, and what it starts with the device, before several threads want them.
            import triton

            triton.runtime.driver.active.get_current_device()
        pool = ThreadPoolExecutor(THREADS)
        first: Future[None] | None = None
        for scheme, shape in wanted.layers:
            with contextlib.suppress(Exception):  # it fails again where it is needed
                check, layer = self.stand_in(scheme, shape)
                for tokens in GPU_TOKENS:
                    self.coming.append(pool.submit(self._compile, first, check, layer, tokens))
                    first = first or self.coming[0]
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Until all are there."""
        for future in self.coming:
            future.exception()
        self.coming = []

    def stand_in(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[KernelCheck, Layer]:
        """What checks such a layer, and one that holds nothing but zeros."""
        check = kernel_for(scheme, shape)
        assert check is not None and scheme.weight is not None
        zeros = torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
        codes = quantize(zeros, scheme.weight)
        scale = torch.ones(1) if scheme.input is not None else None
        tensors = self.format.encode(
            codes, model_dtype=self.dtype, input=scheme.input, input_scale=scale
        )
        here = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return check, check.prepared(Layer("", scheme, here, codes, zeros))

    def _compile(
        self, first: Future[None] | None, check: KernelCheck, layer: Layer, tokens: int
    ) -> None:
        if first is not None:
            first.exception()  # it hashes the compiler, and each thread would do so for itself
        inputs = layer.codes.shape[1] if layer.codes else 0
        with torch.no_grad(), torch.cuda.device(self.device):
            x = torch.zeros(tokens, inputs, device=self.device)
            check.multiply(layer, EVERYTHING, self.device)(x)
