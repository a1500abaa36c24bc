"""A checkpoint in another format, unit by unit: codes stay as they are, floats are rounded only if
that is allowed, and a dense target holds what the codes stand for.

The source is read twice. The first time everything that has no form in the target is found, before
a byte is written; the second time it is written, and a conversion that was interrupted continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.assemble import RECIPE_NAME, finish, take_up
from compressor.checkpoint.find import Located
from compressor.checkpoint.manifest import MANIFEST_NAME, read_manifest
from compressor.checkpoint.one_reading import is_tied
from compressor.checkpoint.reader import content_hash
from compressor.checkpoint.records import stated_hash
from compressor.checkpoint.shards import ShardWriter, plan_shards
from compressor.checkpoint.source import Source
from compressor.checkpoint.workspace import lacking_room, owned
from compressor.errors import CompressError, InputError, Problems
from compressor.formats.base import Format, ModelSchemes, get_format
from compressor.formats.relayout import RoundingReport, as_symmetric, compare, relayout
from compressor.ir.layout import Linear, UnitLayout
from compressor.ir.qtensor import QTensor
from compressor.ir.scheme import KVSpec, Scheme
from compressor.ir.tensor import TensorShape
from compressor.ir.unit import Unit
from compressor.plan.unit_plan import module_groups
from compressor.run.environment import versions
from compressor.run.mx_to_nvfp4 import as_nvfp4_where_held

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Converted:
    """A finished conversion.

    rounded  what was rounded, by tensor;  notes  what the target has no place for and goes
    already  the same conversion was finished before
    """

    output: Path
    source_format: str
    target_format: str
    nbytes: int
    rounded: tuple[RoundingReport, ...]
    notes: tuple[str, ...]
    already: bool = False

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
        }


def convert(
    located: Located,
    output: Path,
    *,
    format: str,
    allow_rounding: bool = False,
    max_shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
) -> Converted:
    """Write a checkpoint's weights in `format` into `output`, a new folder.

    Raises InputError or Problems that name every tensor without a form in the target, before
    anything is written; a folder that this conversion does not own is refused.
    """
    source, target = located.source, get_format(format)
    if target.name != "dense" and not source.quantized:
        raise InputError(
            f"{source.checkpoint.folder} holds "
            + (
                f"{source.low_precision}, which is read as floats"
                if source.low_precision
                else "float weights"
            )
            + "; a conversion chooses no codes",
            hint="quantize it with a recipe: compress recipes",
        )
    job = _Conversion(source, target, allow_rounding=allow_rounding)
    job.study(progress)
    units = source.layout.units
    outputs = [job.outputs(unit) for unit in units]
    groups = [group for tensors in outputs for group in module_groups(tensors)]
    shards = plan_shards(groups, max_bytes=max_shard_size)
    room = lacking_room(output, sum(shard.size for shard in shards.shards))
    if room is not None:
        raise room
    config = job.config()
    about = _about(
        located,
        target,
        content=stated_hash(job.content),
        allow_rounding=allow_rounding,
        max_shard_size=max_shard_size,
    )
    result = Converted(
        output=output,
        source_format=source.format.name,
        target_format=target.name,
        nbytes=sum(shard.size for shard in shards.shards),
        rounded=tuple(job.rounded),
        notes=(*job.notes, *located.beside.notes),
    )
    with owned(output, manifest=MANIFEST_NAME) as work:
        if take_up(work, output, layout=shards, about=about):
            return replace(result, already=True)
        writer = ShardWriter(shards, work, owner=stated_hash(about))
        writer.open()
        for index, unit in enumerate(units):
            if writer.record(index) is None:
                tensors = job.encode(job.read(unit))
                writer.commit(index, writer.write({n: tensors[n] for n in outputs[index]}), {})
            if progress is not None:
                progress(unit.name, len(units) + index + 1, 2 * len(units))
        folder = source.checkpoint.folder
        recipe = folder / RECIPE_NAME
        finish(
            work,
            output,
            writer=writer,
            config=config,
            extra_files=target.files(job.schemes),
            beside=folder,
            recipe=recipe.read_bytes() if recipe.is_file() else None,
            about=about,
        )
    return result


def _about(
    located: Located, target: Format, *, content: str, allow_rounding: bool, max_shard_size: int
) -> dict[str, Any]:
    """What decides the bytes of the result. `content` is the hash of all that was read."""
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
            "content": content,
        },
        "versions": versions(),
        "recipe": None if made_by is None else made_by.about.get("recipe"),
    }


@dataclass(slots=True)
class _Conversion:
    """What becomes of each tensor; `study` finds it out from the data, the rest uses it."""

    source: Source
    target: Format
    allow_rounding: bool
    symmetric: bool = False
    linears: dict[str, Scheme] = field(default_factory=dict)
    kv: KVSpec | None = None
    rounded: list[RoundingReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    content: dict[str, str] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        return self.target.name == "dense"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the target's float tensors."""
        return self.target.model_dtype(self.source.checkpoint.dtype)

    @property
    def schemes(self) -> ModelSchemes:
        return ModelSchemes(linears=self.linears, kv=self.kv)

    def study(self, progress: Progress | None) -> None:
        """Read everything once. Raises Problems with all that the target cannot hold."""
        source, units = self.source, self.source.layout.units
        self.kv = None if self.dense else source.schemes.kv
        self._say_what_goes()
        problems: list[CompressError] = []
        # Zero points that are all at the centre need not be stored, if that is so everywhere.
        centred = not self.dense
        for done, layout in enumerate(units, 1):
            try:
                unit = self.read(layout)
            except InputError as error:
                problems.append(error)
                continue
            for name, tensor in (*unit.tensors.items(), *unit.extra.items()):
                try:
                    self._float(name, tensor)
                except InputError as error:
                    problems.append(error)
            for linear in layout.linears:
                self.linears[linear.name] = Scheme()
                q = unit.quantized.get(linear.name)
                if q is None:
                    continue
                if not bool(q.scales.float().isfinite().all()):
                    problems.append(InputError(f"{linear.name}: its scales hold NaN or infinity"))
                    continue
                plain = as_symmetric(q)
                centred = centred and plain is not None and self._takes(plain, linear)
                try:
                    moved, report = self._relaid(linear, q)
                except InputError as error:
                    problems.append(error)
                    continue
                if report is not None:
                    self.rounded.append(report)
                if not self.dense:
                    self.linears[linear.name] = Scheme(moved.spec, self._input(linear))
            if progress is not None:
                progress(layout.name, done, 2 * len(units))
        if problems:
            raise Problems(problems)
        if centred:
            self.symmetric = True
            for name, scheme in self.linears.items():
                if scheme.weight is not None and scheme.weight.zero == "subtract":
                    spec = replace(scheme.weight, zero="none")
                    self.linears[name] = replace(scheme, weight=spec)

    def read(self, unit: UnitLayout) -> Unit:
        """A unit of the source. Raises InputError where it is not what it was the first time."""
        raw = self.source.checkpoint.read(self.source.names(unit))
        digest = content_hash(raw)
        if self.content.setdefault(unit.name, digest) != digest:
            raise InputError(f"{unit.name} of the source changed while it was converted")
        found = self.source.assemble(unit, raw)
        return found if self.dense else as_nvfp4_where_held(found, self.target, self._input)

    def _say_what_goes(self) -> None:
        self.notes += self.source.checkpoint.notes
        if not self.dense:
            return
        if self.source.schemes.kv is not None:
            self.notes.append("the KV cache's scales are left out: a dense checkpoint has none")
        if any(scheme.input is not None for scheme in self.source.schemes.linears.values()):
            self.notes.append("inputs are no longer quantized: a dense checkpoint cannot say so")

    def _takes(self, q: QTensor, linear: Linear) -> bool:
        return self.target.accepts(Scheme(q.spec, self._input(linear)), linear.shape) is None

    def _input(self, linear: Linear) -> Any:
        return None if self.dense else self.source.schemes.linears[linear.name].input

    def _relaid(self, linear: Linear, q: QTensor) -> tuple[QTensor, RoundingReport | None]:
        if self.symmetric:
            q = as_symmetric(q) or q
        return relayout(
            q,
            self.source.format,
            self.target,
            name=linear.name,
            model_dtype=self.source.checkpoint.dtype,
            allow_rounding=self.allow_rounding,
            input=self._input(linear),
        )

    def _float_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Tensors keep their dtype, unless the target wants the model in another."""
        return stored if self.dtype == self.source.checkpoint.dtype else self.dtype

    def _float(self, name: str, tensor: Tensor) -> None:
        """Note or refuse what a float tensor loses in the target's dtype."""
        moved = tensor.to(self._float_dtype(tensor.dtype))
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{name} holds NaN or infinity", hint="the source is damaged")
        if not bool(moved.isfinite().all()):
            raise InputError(
                f"{name} holds values beyond the range of {moved.dtype}",
                hint="choose a format that keeps the model's dtype, such as compressed-tensors",
            )
        report = compare(tensor, moved, name=name)
        if report is None:
            return
        if not self.allow_rounding:
            raise InputError(
                f"{self.source.format.name} to {self.target.name}: {report}",
                hint="--allow-rounding writes the nearest values",
            )
        self.rounded.append(report)

    def outputs(self, unit: UnitLayout) -> dict[str, TensorShape]:
        """The tensors a unit will have on disk."""
        found: dict[str, TensorShape] = {}
        coded = {linear.weight_name: linear for linear in unit.linears}
        entries = self.source.checkpoint.entries
        for name in unit.tensors:
            linear = coded.get(name)
            if linear is not None and self.source.schemes.linears[linear.name].weight is not None:
                found |= self._packed_shapes(linear)
            else:
                spec = entries[name].spec
                found[name] = TensorShape(self._float_dtype(spec.dtype), spec.shape)
        extra = {
            name: torch.empty(
                entries[name].spec.shape, dtype=entries[name].spec.dtype, device="meta"
            )
            for name in self.source.added.get(unit.name, ())
        }
        for name, tensor in self._extra(unit, extra).items():
            found[name] = TensorShape(tensor.dtype, tuple(tensor.shape))
        return found

    def _packed_shapes(self, linear: Linear) -> dict[str, TensorShape]:
        if self.dense:
            return {linear.weight_name: TensorShape(self.dtype, linear.shape)}
        scheme = self.linears[linear.name]
        assert scheme.weight is not None
        local = self.target.layout(
            scheme.weight, linear.shape, model_dtype=self.dtype, input=scheme.input
        )
        return {f"{linear.name}.{leaf}": spec for leaf, spec in local.items()}

    def encode(self, unit: Unit) -> dict[str, Tensor]:
        """A unit's tensors in the target's format."""
        found = {n: t.to(self._float_dtype(t.dtype)) for n, t in unit.tensors.items()}
        for linear in unit.layout.linears:
            q = unit.quantized.get(linear.name)
            if q is None:
                continue
            moved, _ = self._relaid(linear, q)
            local = self.target.encode(
                moved,
                model_dtype=self.dtype,
                input=self._input(linear),
                input_scale=None if self.dense else unit.input_scales.get(linear.name),
            )
            found |= {f"{linear.name}.{leaf}": tensor for leaf, tensor in local.items()}
        return found | self._extra(unit.layout, unit.extra)

    def _extra(self, unit: UnitLayout, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Added tensors: scales of the KV cache in the target's form, others as they are."""
        scales = {n for n in extra if n.endswith((".k_scale", ".v_scale"))}
        found = {n: t.to(self._float_dtype(t.dtype)) for n, t in extra.items() if n not in scales}
        if self.kv is None or not scales:
            return found
        path = unit.attention_path
        stored = self.source.format.kv_scales({n: extra[n] for n in scales}, path)
        if stored is None:
            return found
        return found | self.target.kv_tensors(
            self.kv, path, k_scale=stored[0], v_scale=stored[1], model_dtype=self.dtype
        )

    def config(self) -> dict[str, Any]:
        """The written config.json."""
        kept = ("torch_dtype", "quantization_config")
        config = {k: v for k, v in self.source.checkpoint.config.items() if k not in kept}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        tied = self.source.layout.tied is not None
        if is_tied(config, self.source.arch) != tied:
            config["tie_word_embeddings"] = tied
        entry = self.target.config(self.schemes)
        return {**config, "quantization_config": entry} if entry else config
