"""Each packed layer, and each quantized cache, through the kernel that runs it."""

from dataclasses import replace

from torch import Tensor

from compressor.ir.layout import Linear, UnitLayout
from compressor.verify.checks.base import Check
from compressor.verify.kernels.cache import cache_kernel, check_cache
from compressor.verify.kernels.check import KernelResult, check_kernel, interpreter_runs
from compressor.verify.kernels.layer import Layer


class Kernels(Check):
    """The products are those of float64 with the weight that the second reader sees."""

    gathers = ("problems", "without_kernel", "caches")

    def begin(self) -> None:
        self.compiling = self.subject.compile_kernels()
        self.without_kernel: list[str] = []
        self.caches: list[KernelResult | None] = []

    def layer(self, linear: Linear, layer: Layer | str) -> None:
        if isinstance(layer, str):
            return
        check = self.subject.kernel(linear)
        if check is None:
            self.without_kernel.append(linear.name)
            return
        self.compiling.wait()
        result = check_kernel(check, layer, device=self.subject.device, seed=self.subject.seed)
        if result.problem:
            self.problems.append(f"{linear.name}: {result.problem}")
        self.found.layers[linear.name] = replace(
            self.found.layers[linear.name],
            kernel=result.kernel,
            triton=result.triton,
            kernel_error=result.error,
        )

    def unit(self, unit: UnitLayout, tensors: dict[str, Tensor]) -> None:
        """One decoding step over the block's quantized cache."""
        subject, shape = self.subject, unit.attention
        kv = subject.source.schemes.kv
        if kv is None or shape is None:
            return
        if cache_kernel(shape, kv) is None:
            self.caches.append(None)
            return
        path = unit.attention_path
        scales = subject.source.format.kv_scales(tensors, path)
        found = check_cache(path, shape, kv, scales, device=subject.device, seed=subject.seed)
        self.caches.append(found)
        if found.problem:
            self.problems.append(f"{path}: {found.problem}")

    def conclude(self) -> None:
        self.found.add("kernels", self.problems, self._detail())

    def _detail(self) -> str:
        """What ran, and how much of it."""
        ran = [layer for layer in self.found.layers.values() if layer.kernel]
        triton = [layer for layer in ran if layer.triton]
        parts = []
        worst = max((layer.kernel_error or 0.0 for layer in ran), default=0.0)
        names = ", ".join(sorted({layer.kernel for layer in ran}))
        if self.subject.device.type == "cuda" and triton:
            parts.append(f"{len(triton)} whole layers through {names} on the GPU")
        elif ran:
            if triton:
                parts.append(
                    f"one seeded tile of each of {len(triton)} layers through {names} in Triton's "
                    "interpreter (at most 32 outputs by 1024 inputs, one token)"
                )
            elif not interpreter_runs():
                parts.append("Triton was loaded for a GPU, so no interpreter")
            parts.append(f"{len(ran)} whole layers through the plain reference")
        if self.without_kernel:
            parts.append(f"{len(self.without_kernel)} layers have no kernel here: decoded only")
        if any(self.caches):
            names = ", ".join(sorted({cache.kernel for cache in self.caches if cache}))
            count = sum(cache is not None for cache in self.caches)
            parts.append(f"a decoding step over the cache of each of {count} blocks by {names}")
            worst = max([worst, *(cache.error for cache in self.caches if cache)])
        if missing := sum(cache is None for cache in self.caches):
            parts.append(f"{missing} caches have heads of a size that no kernel here takes")
        if ran or any(self.caches):
            parts.append(f"largest relative error {worst:.2g}")
        return "; ".join(parts) or "no packed layers"
