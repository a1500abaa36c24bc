"""The checks of `verify` that read weights: unit by unit, each tensor once."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.checkpoint.manifest import MANIFEST_NAME, Manifest
from compressor.checkpoint.safetensors import tensor_bytes
from compressor.checkpoint.source import Source
from compressor.errors import InputError
from compressor.formats.second_reader.decode import DecodedWeight, decode_linear
from compressor.ir.layout import Linear, UnitLayout
from compressor.ir.qtensor import QTensor
from compressor.numerics.chunks import DECODERS, layers_ahead, row_chunks
from compressor.runner.heap import give_back
from compressor.verify.findings import Findings, LayerVerdict
from compressor.verify.kernels.cache import cache_kernel, check_cache
from compressor.verify.kernels.check import KernelResult, check_kernel, interpreter_runs, kernel_for
from compressor.verify.kernels.layer import Layer

if TYPE_CHECKING:
    from compressor.verify.against import Against

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class UnitChecks:
    """One checkpoint; `against` is None where nothing is compared."""

    source: Source
    manifest: Manifest | None
    against: Against | None
    device: torch.device
    seed: int
    found: Findings
    hashes: list[str] = field(default_factory=list)
    finite: list[str] = field(default_factory=list)
    decoded: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    without_kernel: int = 0
    caches: list[KernelResult | None] = field(default_factory=list)

    def run(self, progress: Progress | None) -> None:
        units = self.source.layout.units
        for done, unit in enumerate(units, 1):
            try:
                self._unit(done - 1, unit)
            except InputError as error:
                self.decoded.append(f"{unit.name}: {error.message}")
            if self.against is not None and not self.against.related:
                return  # said at once: what it was made from has to be named first
            give_back()
            if progress is not None:
                progress(unit.name, done, len(units))
        self._conclude()

    def _unit(self, place: int, unit: UnitLayout) -> None:
        raw = self.source.checkpoint.read(self.source.names(unit))
        self._hash(raw)
        for name, tensor in raw.items():
            if tensor.is_floating_point() and not _finite(tensor):
                self.finite.append(f"{name} holds NaN or infinity")
        packed = [x for x in unit.linears if self.source.schemes.linears[x.name].weight is not None]
        for linear, decoded in self._decode(packed, raw):
            self._layer(linear, decoded, raw)
        self._cache(unit, raw)
        if self.against is not None:
            self.against.unit(place, self.source.assemble(unit, raw))

    def _hash(self, raw: dict[str, Tensor]) -> None:
        self.seen |= set(raw)
        if self.manifest is None:
            return
        known = self.manifest.tensors
        with ThreadPoolExecutor(4) as pool:
            digests = pool.map(lambda t: hashlib.sha256(tensor_bytes(t)).hexdigest(), raw.values())
            for name, digest in zip(raw, digests, strict=True):
                if name not in known:
                    self.hashes.append(f"{name} is not in {MANIFEST_NAME}")
                elif digest != known[name]:
                    self.hashes.append(f"{name} is not what was written")

    def _decode(
        self, linears: Sequence[Linear], raw: dict[str, Tensor]
    ) -> Iterator[tuple[Linear, DecodedWeight | str]]:
        """Each layer by the second reader, a few ahead: its weight or what is wrong."""
        config = self.source.checkpoint.config.get("quantization_config")

        def decode(linear: Linear) -> DecodedWeight | str:
            arrays = {leaf: _array(t) for leaf, t in _local(linear, raw).items()}
            try:
                return decode_linear(config, linear.name, arrays)
            except ValueError as error:
                return f"{linear.name}.{error}"

        workers = min(DECODERS, os.cpu_count() or 1)
        ahead: deque[tuple[Linear, Future[DecodedWeight | str]]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            for coming in linears:
                ahead.append((coming, pool.submit(decode, coming)))
                if len(ahead) > layers_ahead(coming.shape, workers):
                    linear, decoded = ahead.popleft()
                    yield linear, decoded.result()
            for linear, decoded in ahead:
                yield linear, decoded.result()

    def _layer(self, linear: Linear, decoded: DecodedWeight | str, raw: dict[str, Tensor]) -> None:
        scheme = self.source.schemes.linears[linear.name]
        assert scheme.weight is not None
        verdict = LayerVerdict(linear=linear.name)
        self.found.layers[linear.name] = verdict
        if isinstance(decoded, str):
            self.decoded.append(decoded)
            return
        tensors = self._moved(_local(linear, raw))
        q = self.source.format.decode(tensors, scheme.weight)
        weight = torch.from_numpy(decoded.weight).to(self.device)
        if not _same(weight, q):
            self.decoded.append(f"{linear.name}: two readers see different weights")
            return
        check = kernel_for(scheme, linear.shape)
        if check is None:
            self.without_kernel += 1
            return
        layer = Layer(name=linear.name, scheme=scheme, tensors=tensors, q=q, weight=weight)
        result = check_kernel(check, layer, device=self.device, seed=self.seed)
        if result.problem:
            self.kernels.append(f"{linear.name}: {result.problem}")
        self.found.layers[linear.name] = LayerVerdict(
            linear=linear.name,
            kernel=result.kernel,
            triton=result.triton,
            kernel_error=result.error,
        )

    def _cache(self, unit: UnitLayout, raw: dict[str, Tensor]) -> None:
        """One decoding step over the block's quantized cache."""
        kv = self.source.schemes.kv
        if kv is None or unit.attention is None:
            return
        if cache_kernel(unit.attention, kv) is None:
            self.caches.append(None)
            return
        path = unit.attention_path
        scales = self.source.format.kv_scales(raw, path)
        found = check_cache(path, unit.attention, kv, scales, device=self.device, seed=self.seed)
        self.caches.append(found)
        if found.problem:
            self.kernels.append(f"{path}: {found.problem}")

    def _moved(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _conclude(self) -> None:
        layers = self.found.layers.values()
        packed = [x for x in layers if self.source.schemes.linears[x.linear].weight is not None]
        if self.manifest is not None:
            lost = sorted(set(self.manifest.tensors) - self.seen)
            self.hashes += [f"{name} is in {MANIFEST_NAME}, but not in the model" for name in lost]
            self.found.add("tensor hashes", self.hashes, f"{len(self.manifest.tensors)} tensors")
        self.found.add("finite", self.finite, "no NaN and no infinity in any float tensor")
        detail = f"{len(packed)} layers, by a reader that shares no code with the writer"
        self.found.add("codes and scales", self.decoded, detail)
        self.found.add("kernels", self.kernels, self._kernel_detail(packed))
        if self.against is not None:
            self.against.conclude()

    def _kernel_detail(self, packed: Sequence[LayerVerdict]) -> str:
        """What ran, and how much of it."""
        ran = [layer for layer in packed if layer.kernel]
        triton = [layer for layer in ran if layer.triton]
        parts = []
        worst = max((layer.kernel_error or 0.0 for layer in ran), default=0.0)
        names = ", ".join(sorted({layer.kernel for layer in ran}))
        if self.device.type == "cuda" and triton:
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
            parts.append(f"{self.without_kernel} layers have no kernel here: decoded only")
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


def _same(weight: Tensor, q: QTensor) -> bool:
    """Whether two readers saw one weight, to the rounding of float64."""
    ours = q.dequantize(torch.float64)
    return weight.shape == ours.shape and all(
        torch.allclose(weight[rows], ours[rows], rtol=1e-12, atol=0) for rows in row_chunks(ours)
    )


def _local(linear: Linear, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """A linear's own tensors, by local name."""
    prefix = f"{linear.name}."
    return {n.removeprefix(prefix): t for n, t in raw.items() if n.startswith(prefix)}


def _array(tensor: Tensor) -> NDArray[Any]:
    """A tensor's bytes as numpy holds them: bfloat16 as uint16, float8 as uint8."""
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.uint16).numpy())
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return np.asarray(tensor.view(torch.uint8).numpy())
    return np.asarray(tensor.numpy())


def _finite(tensor: Tensor) -> bool:
    """Whether every value is; in chunks, so that no copy of a large tensor is made."""
    flat, step = tensor.reshape(-1), 1 << 22
    return all(
        bool(flat[start : start + step].float().isfinite().all())
        for start in range(0, flat.numel(), step)
    )
