"""A verdict on a delta's files: their hashes, its base, signs by a second reader, the kernel.

The kernel multiplies by the packed signs as they are stored, on top of the base's product, and is
held against float64 with the weight that the second reader adds up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.checkpoint.delta.base import stored_hash
from compressor.checkpoint.delta.source import (
    Delta,
    MergedCheckpoint,
    find_base,
    is_delta,
    merged_source,
    open_delta,
)
from compressor.checkpoint.manifest import Manifest
from compressor.checkpoint.source import Source
from compressor.errors import InputError, Problems
from compressor.ir.layout import Linear, UnitLayout
from compressor.numerics.bitdelta import SCALES, SIGNS, SignDelta
from compressor.verify.against import Against
from compressor.verify.findings import Findings, LayerVerdict, VerifyReport
from compressor.verify.kernels.check import (
    GPU_TOKENS,
    TILE_INPUTS,
    TILE_OUTPUTS,
    enable_interpreter,
    interpreter_runs,
)
from compressor.verify.verify import check_attention, check_manifest, verify

Progress = Callable[[str, int, int], None]
KERNEL = "delta_matmul"
ROUNDING = 1e-5
"""What float32 sums may be off, relative to the sum of all magnitudes."""


def verify_model(
    folder: Path,
    *,
    base: str | Source | None = None,
    against: Source | None = None,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """`verify`, or for a delta the checks of this file; `base` is the delta's, if not the recorded.

    Raises InputError where there is no checkpoint, a base is named for what is no delta, or the
    base is not found.
    """
    if is_delta(folder):
        return _verify_delta(
            folder, base=base, against=against, device=device, seed=seed, progress=progress
        )
    if base is not None:
        raise InputError(f"{folder} is not a delta, so it needs no base")
    return verify(folder, against=against, device=device, seed=seed, progress=progress)


def _verify_delta(
    folder: Path,
    *,
    base: str | Source | None,
    against: Source | None,
    device: torch.device,
    seed: int,
    progress: Progress | None,
) -> VerifyReport:
    if device.type == "cpu":
        enable_interpreter()
    found = Findings()
    manifest = check_manifest(folder, found)
    try:
        delta = open_delta(folder)
        below = base if isinstance(base, Source) else find_base(delta, base)
        merged = merged_source(delta, below)
    except InputError as error:
        problems = error.problems if isinstance(error, Problems) else [error]
        found.add("headers and base", [p.message for p in problems], "")
        return found.report(folder)
    stored, taken = len(delta.checkpoint.entries), len(delta.borrowed)
    detail = (
        f"{stored} tensors, {taken} more from the base, all that {merged.arch.model_type} needs"
    )
    found.add("headers and base", [], detail)
    check_attention(folder, merged, found)
    comparison = None
    if against is not None:
        comparison = Against(
            merged,
            against,
            folder,
            device,
            found,
            delta=delta.bits,
            base=merged.checkpoint.base_weight
            if isinstance(merged.checkpoint, MergedCheckpoint)
            else None,
        )
        comparison.beside_weights()
        if not comparison.related:
            return found.report(folder)
    checks = _Checks(delta, merged, manifest, comparison, device, seed, found)
    for done, unit in enumerate(merged.layout.units, 1):
        checks.unit(done - 1, unit)
        if comparison is not None and not comparison.related:
            return found.report(folder)
        if progress is not None:
            progress(unit.name, done, len(merged.layout.units))
    checks.conclude()
    return found.report(folder)


class _Checks:
    """The checks that read weights, unit by unit."""

    def __init__(
        self,
        delta: Delta,
        merged: Source,
        manifest: Manifest | None,
        against: Against | None,
        device: torch.device,
        seed: int,
        found: Findings,
    ) -> None:
        self.delta = delta
        self.merged = merged
        self.manifest = manifest
        self.against = against
        self.device = device
        self.seed = seed
        self.found = found
        self.hashes: list[str] = []
        self.base: list[str] = []
        self.finite: list[str] = []
        self.decoded: list[str] = []
        self.kernels: list[str] = []

    def unit(self, place: int, unit: UnitLayout) -> None:
        """Check one unit."""
        self._hash(unit)
        try:
            tensors = self.merged.checkpoint.read(self.merged.names(unit))
        except InputError as error:
            self.base.append(f"{unit.name}: {error.message}")
            return
        self.finite += [
            f"{name} holds NaN or infinity"
            for name, tensor in tensors.items()
            if not bool(tensor.float().isfinite().all())
        ]
        for linear in unit.linears:
            if linear.name in self.delta.bits:
                self._linear(linear, tensors[linear.weight_name])
        if self.against is not None:
            self.against.unit(place, self.merged.assemble(unit, tensors))

    def _hash(self, unit: UnitLayout) -> None:
        """Stored tensors against the manifest."""
        if self.manifest is None:
            return
        stored = self.delta.checkpoint
        coded = [x.name for x in unit.linears if x.name in self.delta.bits]
        names = [name for name in unit.tensors if name in stored.entries]
        names += [f"{name}.{leaf}" for name in coded for leaf in (SIGNS, SCALES)]
        for name, tensor in stored.read(names).items():
            if self.manifest.tensors.get(name) != stored_hash(tensor):
                self.hashes.append(f"{name} is not what was written")

    def _linear(self, linear: Linear, weight: Tensor) -> None:
        checkpoint = self.merged.checkpoint
        assert isinstance(checkpoint, MergedCheckpoint)
        base, part = checkpoint.base_weight(linear), self.delta.read(linear)
        second = second_reader(base, part)
        # Float32 sums and one rounding to the checkpoint's dtype lie between the two.
        terms = base.double().abs() + float(part.scales.abs().sum())
        bound = torch.finfo(weight.dtype).eps * second.abs() + 2**-21 * terms
        if not bool(((weight.double() - second).abs() <= bound).all()):
            self.decoded.append(f"{linear.name}: two readers see different weights")
            return
        error, triton, problem = self._kernel(linear, base, part, second)
        if problem:
            self.kernels.append(f"{linear.name}: {problem}")
        self.found.layers[linear.name] = LayerVerdict(
            linear=linear.name, kernel=KERNEL, triton=triton, kernel_error=error
        )

    def _kernel(
        self, linear: Linear, base: Tensor, part: SignDelta, weight: Tensor
    ) -> tuple[float, bool, str]:
        """Relative error of the products, whether Triton code ran, and what is wrong."""
        # Only here, since importing it decides whether Triton interprets.
        triton = self.device.type == "cuda" or interpreter_runs()
        from compressor_kernels.linear.bitdelta import delta_matmul, delta_matmul_ref

        seed = hashlib.sha256(f"{self.seed}/{linear.name}".encode()).digest()[:6]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        rows, columns = slice(None), slice(None)
        tokens = GPU_TOKENS if self.device.type == "cuda" else (1,)
        if self.device.type != "cuda":
            rows = _piece(linear.out_features, TILE_OUTPUTS, generator)
            columns = _piece(linear.in_features, TILE_INPUTS, generator)
        products: list[tuple[Callable[..., Tensor], slice, slice, int]]
        products = [(delta_matmul, rows, columns, count) for count in tokens if triton]
        if self.device.type != "cuda":
            products.append((delta_matmul_ref, slice(None), slice(None), 2))
        worst, problem = 0.0, ""
        for product, rows, columns, count in products:
            stop = columns.stop or linear.in_features
            words = slice((columns.start or 0) // 32, -(-stop // 32))
            wanted, below = weight[rows, columns].to(self.device), base[rows, columns]
            below = below.to(self.device, torch.float32)
            x = torch.randn(1, count, wanted.shape[1], generator=generator).to(self.device)
            y = x @ below.mT
            for signs, scale in zip(part.signs, part.scales, strict=True):
                picked = signs[words, rows][None].contiguous().to(self.device)
                y = product(x, picked, scale.reshape(1).to(self.device), base_out=y)
            expected = x[0].double() @ wanted.mT
            sizes = below.double().abs() + float(part.scales.abs().sum())
            off = (y[0].double() - expected).abs()
            bad = ~(off <= ROUNDING * (x[0].double().abs() @ sizes.mT) + 1e-30)
            scale_ = expected.square().mean().sqrt().clamp(min=1e-30)
            worst = max(worst, float(off.square().mean().sqrt() / scale_))
            if bool(bad.any()) and not problem:
                problem = f"{KERNEL} is wrong in {int(bad.sum())} of {bad.numel()} outputs"
        return worst, triton, problem

    def conclude(self) -> None:
        """Turn what was seen into checks."""
        found, layers = self.found, list(self.found.layers.values())
        if self.manifest is not None:
            found.add("tensor hashes", self.hashes, f"{len(self.manifest.tensors)} tensors")
        read = len(self.delta.borrowed) + len(self.delta.bits)
        found.add("the base", self.base, f"{read} tensors have the hashes the delta knows them by")
        found.add("finite", self.finite, "no NaN and no infinity in any tensor")
        detail = f"{len(layers)} layers, by a reader that shares no code with the writer"
        found.add("signs and scales", self.decoded, detail)
        where = "whole layers on the GPU"
        if self.device.type != "cuda":
            where = "whole layers through the plain reference"
            if any(layer.triton for layer in layers):
                where += f", a tile of each through {KERNEL} in Triton's interpreter"
        worst = max((layer.kernel_error or 0.0 for layer in layers), default=0.0)
        found.add("kernels", self.kernels, f"{where}; largest relative error {worst:.2g}")
        if self.against is not None:
            self.against.conclude()


def second_reader(base: Tensor, part: SignDelta) -> Tensor:
    """The weight [out, in] in float64, from the words as bytes say them."""
    total: NDArray[np.float64] = base.double().numpy()
    for words, scale in zip(part.signs.numpy(), part.scales.numpy(), strict=True):
        raw = np.ascontiguousarray(words.T).astype("<i4").view(np.uint8)
        bits = np.unpackbits(raw, axis=1, bitorder="little")[:, : part.in_features]
        total = total + np.where(bits == 1, float(scale), -float(scale))
    return torch.from_numpy(total)


def _piece(count: int, step: int, generator: torch.Generator) -> slice:
    """Up to `step` of `count`, at a multiple of `step` that the seed chooses."""
    at = int(torch.randint(0, -(-count // step), (1,), generator=generator)) * step
    return slice(at, min(at + step, count))
