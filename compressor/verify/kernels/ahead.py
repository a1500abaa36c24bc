"""Kernels of packed layers, compiled side by side before the first layer is checked.

A kernel is made for the sides of a linear and the number of tokens, so a checkpoint of one shape of
block needs a dozen. Each takes most of a second of one processor, and none needs a weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from compressor.formats.base import Format
from compressor.ir.scheme import Scheme
from compressor.numerics import quantize
from compressor.verify.kernels.check import GPU_TOKENS, kernel_for
from compressor.verify.kernels.layer import EVERYTHING, KernelCheck, Layer

THREADS = 6
"""More would not be faster: much of the compiler runs one thread at a time."""


class CompiledAhead:
    """The kernels on their way.

    layers  scheme and shape of linears: the packed ones count, each kind once
    format, dtype  of the checkpoint
    """

    def __init__(
        self,
        layers: Iterable[tuple[Scheme, tuple[int, int]]],
        *,
        format: Format,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.format, self.dtype, self.device = format, dtype, device
        self.coming: list[Future[None]] = []
        if device.type != "cuda":
            return
        with contextlib.suppress(ImportError):
            # Once, and what it starts with the device, before several threads want them.
            import triton

            triton.runtime.driver.active.get_current_device()
        pool = ThreadPoolExecutor(THREADS)
        first: Future[None] | None = None
        for scheme, shape in dict.fromkeys((s, shape) for s, shape in layers if s.weight):
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
