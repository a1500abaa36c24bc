"""A checkpoint in another format, unit by unit: codes stay as they are, floats are rounded only if
that is allowed, and a dense target holds what the codes stand for.

The source is read twice. The first time, mostly without codes, everything that has no form in the
target is found, before a byte is written; the second time it is written, and a conversion that was
interrupted continues.
What was written can then be verified against the source, as a run verifies against the original.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.container import Container, Safetensors
from compressor.checkpoint.find import Located
from compressor.checkpoint.manifest import RECIPE_NAME, read_manifest
from compressor.checkpoint.source import Source, is_cache_scale
from compressor.checkpoint.target import ModelTarget
from compressor.checkpoint.transaction import Progress, write
from compressor.checkpoint.workspace import refusal
from compressor.errors import CompressError, InputError, Problems
from compressor.formats.base import Format, ModelSchemes, get_format
from compressor.formats.relayout import (
    RoundingReport,
    as_symmetric,
    compare,
    relayout,
    rounding_refused,
)
from compressor.ir.layout import Linear, UnitLayout
from compressor.ir.qtensor import QTensor
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.ir.tensor import TensorShape
from compressor.ir.unit import Unit
from compressor.plan.offers import format_offer
from compressor.run.convert_source import ConvertedSource
from compressor.run.environment import versions
from compressor.run.mx_to_nvfp4 import as_nvfp4_where_held
from compressor.run.warm_up import compile_verdict
from compressor.verify.apart import Apart
from compressor.verify.findings import VerifyReport
from compressor.verify.kernels.check import enable_interpreter
from compressor.verify.verify import verify

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Converted:
    """A finished conversion.

    rounded   what was rounded, by tensor;  notes  what the target has no place for and goes
    already   the same conversion was finished before
    verified  the verdict on the files, held against the source, where it was asked for
    """

    output: Path
    source_format: str
    target_format: str
    nbytes: int
    rounded: tuple[RoundingReport, ...]
    notes: tuple[str, ...]
    already: bool = False
    verified: VerifyReport | None = None

    @property
    def ok(self) -> bool:
        """Nothing that was checked failed."""
        return self.verified is None or self.verified.ok

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "source_format": self.source_format,
            "target_format": self.target_format,
            "bytes": self.nbytes,
            "rounded": [
                {
                    "tensor": report.name,
                    "rounded": report.rounded,
                    "total": report.total,
                    "max_relative_error": report.max_relative_error,
                }
                for report in self.rounded
            ],
            "notes": list(self.notes),
            "already_done": self.already,
            "verify": None if self.verified is None else self.verified.to_json(),
        }


def convert(
    located: Located,
    output: Path,
    *,
    format: str,
    allow_rounding: bool = False,
    max_shard_size: int = 5 * 10**9,
    device: torch.device = CPU,
    verifying: bool = False,
    progress: Progress = lambda name, done, total: None,
    apart: Apart | None = None,
) -> Converted:
    """Write a checkpoint's weights in `format` into `output`, a new folder.

    device     where codes are unpacked and packed
    verifying  reopen what was written and hold it against the source, as a run does
    apart      a process that has a part in that (`verify`)
    Raises InputError or Problems that name every tensor without a form in the target, before
    anything is written; a folder that this conversion does not own is refused.
    """
    source, target = located.source, get_format(format)
    folder, units = source.checkpoint.folder, len(source.layout.units)
    if (refused := refusal(output, models=[folder])) is not None:
        raise refused
    if target.name != "dense" and not source.quantized:
        low = source.low_precision
        held = f"{low}, which is read as floats" if low else "float weights"
        raise InputError(
            f"{folder} holds {held}; a conversion chooses no codes",
            hint="quantize it with a recipe: compress recipes",
        )
    if verifying and device.type == "cpu":
        # Now, since others import Triton, and it looks only once.
        enable_interpreter()
    job = _Conversion(ConvertedSource(source, device), target, allow_rounding)
    steps = (3 if verifying else 2) * units
    container = Safetensors(max_shard_size, source.checkpoint.stem)
    made = job.study(container, partial(_show, progress, 0, steps))
    if verifying:
        compile_verdict(made, device, apart)
    recipe = folder / RECIPE_NAME
    written = write(
        made,
        output,
        job.converted,
        about=_about(
            located,
            target,
            beside_codes=job.read.beside_codes,
            allow_rounding=allow_rounding,
            max_shard_size=max_shard_size,
        ),
        beside=folder,
        device=device,
        recipe=recipe.read_bytes() if recipe.is_file() else None,
        content=job.read.content,
        progress=partial(_show, progress, units, steps),
    )
    report = None
    if verifying:
        report = verify(
            output,
            against=job.remaining(),
            device=device,
            progress=partial(_show, progress, 2 * units, steps),
            apart=apart,
        )
    return Converted(
        output=output,
        source_format=source.format.name,
        target_format=target.name,
        nbytes=written.shards.size,
        rounded=tuple(job.rounded),
        notes=(*job.notes, *located.beside.notes),
        already=written.finished,
        verified=report,
    )


def _show(progress: Progress, before: int, steps: int, name: str, done: int, total: int) -> None:
    """One more unit of several rounds over them."""
    progress(name, before + done, steps)


def _about(
    located: Located,
    target: Format,
    *,
    beside_codes: str,
    allow_rounding: bool,
    max_shard_size: int,
) -> dict[str, Any]:
    """What decides the bytes of the result. `beside_codes` is the hash of all that has been read
    when it begins."""
    checkpoint = located.source.checkpoint
    headers = [
        [name, str(entry.spec.dtype), list(entry.spec.shape), entry.begin]
        for name, entry in sorted(checkpoint.entries.items())
    ]
    made_by = read_manifest(checkpoint.folder)
    stated = json.dumps([dict(checkpoint.config), headers], sort_keys=True, default=str)
    manifest = "" if made_by is None else hashlib.sha256(made_by.to_bytes()).hexdigest()
    return {
        "convert": {
            "format": target.name,
            "allow_rounding": allow_rounding,
            "max_shard_size": max_shard_size,
        },
        "source": {
            **located.identity,
            "format": located.source.format.name,
            "headers": hashlib.sha256(stated.encode()).hexdigest(),
            "manifest": manifest,
            "beside_codes": beside_codes,
        },
        "versions": versions(),
        "recipe": None if made_by is None else made_by.about.get("recipe"),
    }


@dataclass(slots=True)
class _Conversion:
    """What becomes of each tensor; `study` finds it out from the data, the rest uses it."""

    read: ConvertedSource
    format: Format
    allow_rounding: bool
    symmetric: bool = False
    rounded: list[RoundingReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    offers: dict[tuple[Scheme, tuple[int, int]], str] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        return self.read.source

    @property
    def dense(self) -> bool:
        return self.format.name == "dense"

    @property
    def kv(self) -> KVSpec | None:
        return None if self.dense else self.source.schemes.kv

    def study(self, container: Container, progress: Progress) -> ModelTarget:
        """Read everything but codes once; what is to be written. Raises Problems with all that has
        no form in it."""
        source, units = self.source, self.source.layout.units
        fmt, dtype = self.format, self.format.model_dtype(source.checkpoint.dtype)
        target = ModelTarget(
            source=source, format=fmt, schemes=source.schemes, dtype=dtype, container=container
        )
        self._say_what_goes()
        linears: dict[str, Scheme] = {}
        problems: list[CompressError] = []
        # Zero points that are all at the centre need not be stored, if that is so everywhere.
        centred = not self.dense
        for done, layout in enumerate(units, 1):
            try:
                unit = self._held(self.read.without_codes(layout))
            except InputError as error:
                problems.append(error)
                continue
            for name, tensor in (*unit.tensors.items(), *unit.extra.items()):
                try:
                    kept = name in layout.others
                    self._float(name, tensor, tensor.dtype if kept else target.float_dtype(name))
                except InputError as error:
                    problems.append(error)
            for linear in layout.linears:
                linears[linear.name] = Scheme()
                if (q := unit.quantized.get(linear.name)) is None:
                    continue
                if not bool(q.scales.float().isfinite().all()):
                    problems.append(InputError(f"{linear.name}: its scales hold NaN or infinity"))
                    continue
                plain = as_symmetric(q)
                if plain is None or fmt.accepts(
                    Scheme(plain.spec, self._input(linear)), linear.shape
                ):
                    centred = False
                try:
                    moved, report = self._relaid(linear, q)
                except InputError as error:
                    hint = error.hint or self._offer(linear, q)
                    problems.append(InputError(error.message, hint=hint))
                    continue
                if report is not None:
                    self.rounded.append(report)
                linears[linear.name] = Scheme(moved.spec, self._input(linear))
            progress(layout.name, done, len(units))
        held = ((x, linears[x.name]) for x in source.layout.linears if x.name in linears)
        if reason := fmt.refuses(source.layout.model_type, held):
            problems.append(InputError(f"{fmt.name}: {reason}"))
        lossy = [r for r in self.rounded if r.source_dtype != r.target_dtype]
        if lossy and not self.allow_rounding:
            problems.append(rounding_refused(lossy, source.format, fmt))
        if problems:
            raise Problems(problems)
        if centred:
            self.symmetric = True
            for name, scheme in linears.items():
                if scheme.weight is not None and scheme.weight.zero == "subtract":
                    spec = replace(scheme.weight, zero="none")
                    linears[name] = replace(scheme, weight=spec)
        added: dict[str, dict[str, TensorShape]] = {}
        scales: dict[str, int] = {}
        for layout in units:
            coded = {x.weight_name for x in layout.linears if source.schemes.linears[x.name].weight}
            names = [n for n in source.added.get(layout.name, ()) if n not in coded]
            shapes = {n: source.checkpoint.shapes[n] for n in names}
            meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            scales |= {path: keys.numel() for path, (keys, _) in self._scales(layout, meta).items()}
            added[layout.name] = {
                name: TensorShape(target.float_dtype(name), shape)
                for name, shape in shapes.items()
                if not is_cache_scale(name)
            }
        schemes = ModelSchemes(linears=linears, kv=self.kv)
        return replace(target, schemes=schemes, added=added, scales=scales)

    def _held(self, unit: Unit) -> Unit:
        """The unit with weights of a kind that the target holds, where there is one."""
        return unit if self.dense else as_nvfp4_where_held(unit, self.format, self._input)

    def remaining(self) -> Source:
        """The source without what the target has no place for, which the result is held against."""
        if not self.dense:
            return self.source
        linears = {n: replace(s, input=None) for n, s in self.source.schemes.linears.items()}
        return replace(self.source, schemes=ModelSchemes(linears=linears, kv=None))

    def converted(self, unit: UnitLayout) -> Unit:
        """A unit with the specs and scale dtypes that the target stores."""
        found = self._held(self.read.whole(unit))
        quantized = {
            linear.name: self._relaid(linear, found.quantized[linear.name])[0]
            for linear in unit.linears
            if linear.name in found.quantized
        }
        return replace(found, quantized=quantized, kv_scales=self._scales(unit, found.extra))

    def _say_what_goes(self) -> None:
        self.notes += self.source.checkpoint.notes
        if not self.dense:
            return
        if self.source.schemes.kv is not None:
            self.notes.append("the KV cache's scales are left out: a dense checkpoint has none")
        if any(scheme.input is not None for scheme in self.source.schemes.linears.values()):
            self.notes.append("inputs are no longer quantized: a dense checkpoint cannot say so")

    def _input(self, linear: Linear) -> ActivationSpec | None:
        return None if self.dense else self.source.schemes.linears[linear.name].input

    def _offer(self, linear: Linear, q: QTensor) -> str:
        """What would hold a weight that the target does not."""
        scheme, dtype = Scheme(q.spec, self._input(linear)), self.source.checkpoint.dtype
        key, fmt, layout = (scheme, linear.shape), self.format, self.source.layout
        if key not in self.offers:
            offer = format_offer(scheme, [linear], layout, fmt=fmt, dtype=dtype, runtime=None)
            self.offers[key] = f"{offer}; dense writes what the codes stand for"
        return self.offers[key]

    def _relaid(self, linear: Linear, q: QTensor) -> tuple[QTensor, RoundingReport | None]:
        if self.symmetric:
            q = as_symmetric(q) or q
        return relayout(
            q,
            self.source.format,
            self.format,
            name=linear.name,
            model_dtype=self.source.checkpoint.dtype,
            allow_rounding=True,  # which `study` has refused where it is not
            input=self._input(linear),
        )

    def _scales(
        self, unit: UnitLayout, extra: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Scales of a block's cache among its added tensors, by the path of its attention."""
        stored = {name: tensor for name, tensor in extra.items() if is_cache_scale(name)}
        if self.kv is None or not stored:
            return {}
        path = unit.attention_path
        found = self.source.format.kv_scales(stored, path)
        return {} if found is None else {path: found}

    def _float(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        """Note what a float tensor loses in the target's dtype."""
        tensor = tensor.to(self.read.device)  # what a unit has beside its own tensors
        moved = tensor.to(dtype)
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinity", hint="the source is damaged")
        if not bool(moved.isfinite().all()):
            raise InputError(
                f"{name} holds values beyond the range of {moved.dtype}",
                hint="choose a format that keeps the model's dtype, such as compressed-tensors",
            )
        if (report := compare(tensor, moved, name=name)) is not None:
            self.rounded.append(report)
