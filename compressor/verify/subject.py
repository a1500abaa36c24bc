"""What is verified: a checkpoint, or a delta together with its base, unit by unit."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.checkpoint.delta.source import (
    Delta,
    MergedCheckpoint,
    find_base,
    is_delta,
    merge,
    open_delta,
)
from compressor.checkpoint.manifest import Manifest
from compressor.checkpoint.source import Source, as_source, open_source
from compressor.errors import InputError
from compressor.formats.second_reader.decode import decode_linear
from compressor.formats.second_reader.grids import CodedWeight, Decoded, DecodedWeight
from compressor.ir.layout import Linear, UnitLayout
from compressor.ir.qtensor import QTensor
from compressor.ir.scheme import Scheme
from compressor.numerics.bitdelta import SCALES, SIGNS
from compressor.numerics.chunks import CODED_AHEAD, DECODERS, layers_ahead, row_chunks
from compressor.ranks.ranks import ALONE, Ranks
from compressor.verify.dense_weight import PlacedWeight, dense
from compressor.verify.kernels.ahead import CompiledAhead, Wanted
from compressor.verify.kernels.bitdelta import BASE, SignsOnBase
from compressor.verify.kernels.check import kernel_for
from compressor.verify.kernels.layer import KernelCheck, Layer

Found = Decoded | PlacedWeight | str
"""A layer by the second reader, or what is wrong with it."""

DIFFERENT = "two readers see different weights"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint.

    source    what its files stand for
    manifest  the hashes they should have, where they were written by us
    original  what it is compared with, if anything
    ranks     that share its units
    """

    opened: ClassVar[str] = "headers and tensors"
    coding: ClassVar[str] = "codes and scales"
    """Names of two checks, as its users know them."""

    folder: Path
    source: Source
    manifest: Manifest | None
    original: Source | None
    device: torch.device
    seed: int
    ranks: Ranks = ALONE
    begun: dict[str, _Decoding] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, base: str | Source | None, **asked: Any) -> Self:
        """Raises InputError, or Problems, where headers show that it is not whole."""
        return cls(folder=folder, source=open_source(folder), **asked)

    @property
    def on_gpu(self) -> bool:
        """Whether layers are checked on another device than the processor."""
        return self.device.type != "cpu"

    @property
    def units(self) -> dict[int, UnitLayout]:
        """Those that are checked here, by their index: the first, since what follows is compared by
        what it shows, and of the others those that are dealt to this rank."""
        rank, world = self.ranks.rank, self.ranks.world
        every = enumerate(self.source.layout.units)
        return {index: unit for index, unit in every if index == 0 or index % world == rank}

    @property
    def contents(self) -> str:
        """What it consists of."""
        entries = self.source.checkpoint.entries
        shards = len({entry.file for entry in entries.values()})
        return f"{len(entries)} tensors in {shards} file{'s' * (shards > 1)}"

    @property
    def from_base(self) -> int | None:
        """How many of a base's tensors it needs; None where it has no base."""
        return None

    def packed(self, unit: UnitLayout) -> list[Linear]:
        """Linears that are stored as something else than floats."""
        schemes = self.source.schemes.linears
        return [x for x in unit.linears if schemes[x.name].weight is not None]

    def difference(self, linear: Linear) -> tuple[Tensor, int] | None:
        """The base's weight, and the signs that each weight has, where that is what is stored."""
        return None

    def kernel(self, linear: Linear) -> KernelCheck | None:
        """The kernel that multiplies by a packed linear, or None."""
        return kernel_for(self.source.schemes.linears[linear.name], linear.shape)

    def compile_kernels(self) -> CompiledAhead:
        """A GPU's kernels for the packed linears, on their way."""
        source = self.source
        return CompiledAhead(
            Wanted.of(
                source.layout.linears,
                source.schemes,
                format=source.format,
                dtype=source.checkpoint.dtype,
                device=self.device,
            )
        )

    def stored(self, unit: UnitLayout) -> dict[str, Tensor]:
        """Tensors of the folder's own files that belong to a unit."""
        return self.source.checkpoint.in_files(self.source.names(unit), pin=self.on_gpu)

    def ahead(self, unit: UnitLayout) -> dict[str, Tensor]:
        """`stored` of the unit that is next: beside a GPU the second reader begins with it."""
        stored = self.stored(unit)
        if self.on_gpu:
            self.begun[unit.name] = self._decoding(unit, self.read(unit, stored))
        return stored

    def read(self, unit: UnitLayout, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of a unit's tensors."""
        return self.source.checkpoint.view(self.source.names(unit), stored)

    def on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A unit's tensors where they are checked; what is carried over is not computed with."""
        left = set(self.source.layout.carried)
        return {
            name: tensor if name in left else tensor.to(self.device, non_blocking=True)
            for name, tensor in tensors.items()
        }

    def layers(
        self, unit: UnitLayout, tensors: Mapping[str, Tensor], here: Mapping[str, Tensor]
    ) -> Iterator[tuple[Linear, Layer | str]]:
        """Each packed linear as both readers see it, or what is wrong with it.

        here  the same tensors on the device
        """
        for linear, decoded in self.begun.pop(unit.name, None) or self._decoding(unit, tensors):
            if isinstance(decoded, str):
                yield linear, decoded
            else:
                yield linear, self._layer(linear, decoded, _local(linear, here))

    def _layer(
        self, linear: Linear, decoded: Decoded | PlacedWeight, tensors: Mapping[str, Tensor]
    ) -> Layer | str:
        scheme = self.source.schemes.linears[linear.name]
        assert scheme.weight is not None
        q = self.source.format.decode(tensors, scheme.weight)
        weight = dense(decoded, self.device)
        if not _same(weight, q):
            return f"{linear.name}: {DIFFERENT}"
        return Layer(name=linear.name, scheme=scheme, tensors=tensors, codes=q, weight=weight)

    def _decoding(self, unit: UnitLayout, raw: Mapping[str, Tensor]) -> _Decoding:
        """The second reader begins with a unit's first layers."""
        config = self.source.checkpoint.config.get("quantization_config")

        def decode(linear: Linear) -> Found:
            arrays = {leaf: _array(t) for leaf, t in _local(linear, raw).items()}
            try:
                found = decode_linear(config, linear.name, arrays)
            except ValueError as error:
                return f"{linear.name}.{error}"
            if isinstance(found, CodedWeight):
                # In this thread: whoever checks the layer would wait for either.
                on_gpu = self.on_gpu
                return (
                    PlacedWeight.of(found, self.device) if on_gpu else DecodedWeight(found.weight)
                )
            return found

        # What a GPU is given is codes, a byte each; on a CPU each layer is there in float64.
        most, width = (CODED_AHEAD, 1) if self.on_gpu else (DECODERS, 8)
        return _Decoding(decode, self.packed(unit), workers=most, width=width)


class _Decoding:
    """Each layer by the second reader, a few ahead in threads: its weight or what is wrong."""

    def __init__(
        self,
        decode: Callable[[Linear], Found],
        linears: Sequence[Linear],
        *,
        workers: int,
        width: int,
    ) -> None:
        self.decode, self.linears, self.width = decode, deque(linears), width
        self.workers = min(workers, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.workers)
        self.ahead: deque[tuple[Linear, Future[Found]]] = deque()
        self._fill()

    def __iter__(self) -> Iterator[tuple[Linear, Found]]:
        while self.ahead:
            linear, decoded = self.ahead.popleft()
            yield linear, decoded.result()
            self._fill()
        self.pool.shutdown()

    def _fill(self) -> None:
        while self.linears:
            shape = self.linears[0].shape
            if len(self.ahead) > layers_ahead(shape, self.workers, width=self.width):
                return
            linear = self.linears.popleft()
            self.ahead.append((linear, self.pool.submit(self.decode, linear)))


@dataclass(frozen=True, kw_only=True)
class DeltaSubject(Subject):
    """A delta; its `source` is the model that it makes of its base."""

    opened = "headers and base"
    coding = "signs and scales"

    delta: Delta
    merged: MergedCheckpoint

    @classmethod
    def open(cls, folder: Path, base: str | Source | None, **asked: Any) -> Self:
        delta = open_delta(folder)
        merged = merge(delta, find_base(delta, base))
        return cls(folder=folder, source=as_source(merged), delta=delta, merged=merged, **asked)

    @property
    def contents(self) -> str:
        stored, taken = len(self.delta.checkpoint.entries), len(self.delta.borrowed)
        return f"{stored} tensors, {taken} more from the base"

    @property
    def from_base(self) -> int | None:
        return len(self.delta.borrowed) + len(self.delta.bits)

    def packed(self, unit: UnitLayout) -> list[Linear]:
        return [x for x in unit.linears if x.name in self.delta.bits]

    def difference(self, linear: Linear) -> tuple[Tensor, int] | None:
        bits = self.delta.bits.get(linear.name)
        return None if bits is None else (self.merged.base_weight(linear), bits)

    def kernel(self, linear: Linear) -> KernelCheck | None:
        return SignsOnBase()

    def compile_kernels(self) -> CompiledAhead:
        source = self.source
        return CompiledAhead(Wanted((), source.format, source.checkpoint.dtype, self.device))

    def ahead(self, unit: UnitLayout) -> dict[str, Tensor]:
        return self.stored(unit)

    def read(self, unit: UnitLayout, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.source.checkpoint.read(self.source.names(unit))

    def layers(
        self, unit: UnitLayout, tensors: Mapping[str, Tensor], here: Mapping[str, Tensor]
    ) -> Iterator[tuple[Linear, Layer | str]]:
        for linear in self.packed(unit):
            base, part = self.merged.base_weight(linear), self.delta.read(linear)
            held = {BASE: base, SIGNS: part.signs, SCALES: part.scales}
            config = self.delta.checkpoint.config["quantization_config"]
            arrays = {**{leaf: _array(t) for leaf, t in held.items()}, BASE: base.double().numpy()}
            second = torch.from_numpy(decode_linear(config, linear.name, arrays).weight)
            weight = tensors[linear.weight_name]
            # Float32 sums and one rounding to the checkpoint's dtype lie between the two.
            terms = base.double().abs() + float(part.scales.abs().sum())
            bound = torch.finfo(weight.dtype).eps * second.abs() + 2**-21 * terms
            if not bool(((weight.double() - second).abs() <= bound).all()):
                yield linear, f"{linear.name}: {DIFFERENT}"
                continue
            yield (
                linear,
                Layer(name=linear.name, scheme=Scheme(), tensors=held, codes=None, weight=second),
            )


def kind_of(folder: Path) -> type[Subject]:
    """What a checkpoint folder holds, as far as its config says; opening it says the rest."""
    try:
        return DeltaSubject if is_delta(folder) else Subject
    except InputError:
        return Subject


def _same(weight: Tensor, q: QTensor) -> bool:
    """Whether two readers saw one weight, to the rounding of float64."""
    ours = q.dequantize(torch.float64)
    if weight.shape != ours.shape:
        return False
    if torch.equal(weight, ours):  # as nearly always, seen at a tenth of the cost
        return True
    near = [
        torch.isclose(weight[rows], ours[rows], rtol=1e-12, atol=0).all()
        for rows in row_chunks(ours)
    ]
    return bool(torch.stack(near).all())  # asked once: each answer waits for the device


def _local(linear: Linear, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
