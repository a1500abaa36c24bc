"""What is written: units under their names, a config, files beside it, and a container for all.

`Target` is all that a write needs to know; `ModelTarget` is a whole model in one format, be it made
by a recipe or converted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.checkpoint.assemble import assembled
from compressor.checkpoint.container import Container
from compressor.checkpoint.disassemble import packed
from compressor.checkpoint.one_reading import is_tied
from compressor.checkpoint.source import Source, is_cache_scale
from compressor.errors import InputError
from compressor.formats.base import Format, ModelSchemes
from compressor.ir.floats import home_of, narrow, replaced
from compressor.ir.layout import Linear, TensorRef, UnitLayout, is_weight, weight_name
from compressor.ir.qtensor import QTensor
from compressor.ir.scheme import Scheme
from compressor.ir.tensor import TensorShape
from compressor.ir.unit import Unit
from compressor.ranks.ranks import ALONE, Ranks

NONE: Mapping[str, QTensor] = MappingProxyType({})
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Target(Protocol):
    """A checkpoint that can be written unit by unit."""

    @property
    def units(self) -> Sequence[UnitLayout]:
        """Those units of the source that are written, in order."""

    @property
    def container(self) -> Container:
        """The files that tensors lie in."""

    def shapes(self, unit: UnitLayout) -> dict[str, TensorShape]:
        """The tensors of a unit on disk, under the names that they have there, in order."""

    def encode(self, unit: Unit) -> dict[str, Tensor]:
        """Those tensors. Raises InputError where a value has no form."""

    def decode(
        self, unit: UnitLayout, tensors: Mapping[str, Tensor], *, ranks: Ranks = ALONE
    ) -> Unit:
        """The unit that written tensors stand for; ranks divide the work."""

    def config(self) -> dict[str, Any]:
        """config.json; empty for what is no model."""

    def files(self) -> dict[str, Any]:
        """Other JSON files, by name."""


@dataclass(frozen=True, kw_only=True)
class ModelTarget:
    """A model in one format.

    schemes  what each linear and the cache become
    dtype    of the written model;  recast  whether floats that the source has in another get it too
    untied   a head that shares the embedding's weight gets its own
    scales   path of an attention module → how many static scales of its keys are stored, and of
             its values
    added    name of a unit → tensors that it has beside the source's
    entries  what config.json says beside the source's, the dtype and the quantization
    """

    source: Source
    format: Format
    schemes: ModelSchemes
    dtype: torch.dtype
    container: Container
    recast: bool = False
    untied: bool = False
    scales: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, Mapping[str, TensorShape]] = field(default_factory=dict)
    entries: Mapping[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> Sequence[UnitLayout]:
        """All of the source's."""
        return self.source.layout.units

    def shapes(self, unit: UnitLayout) -> dict[str, TensorShape]:
        """What is coded in the place of its weight; then what is added, and scales of the cache."""
        entries = self.source.checkpoint.entries
        by_weight = {linear.weight_name: linear for linear in unit.linears}
        names = list(unit.tensors)
        if unit.kind == "head" and self.untied and self.source.layout.tied is not None:
            names += by_weight
        found: dict[str, TensorShape] = {}
        for name in names:
            linear = by_weight.get(name)
            if linear is not None and self.schemes.linears[linear.name].weight is not None:
                found |= {f"{linear.name}.{n}": spec for n, spec in self._leaves(linear).items()}
            elif name in unit.others:
                found[name] = entries[name].spec
            else:
                shape = entries[name].spec.shape if linear is None else linear.shape
                found[name] = TensorShape(self.float_dtype(name), shape)
        for stack in self._stacked(unit):
            # Most look up packed experts one by one, and floats in a stack.
            state = {
                name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
                for name, spec in found.items()
            }
            parts, built = self._restacked(unit, stack, state)
            found = {name: spec for name, spec in found.items() if name not in parts}
            found |= _specs(built)
        found |= self.added.get(unit.name, {})
        for path in (mixer.path for mixer in unit.mixers if mixer.path in self.scales):
            scale = torch.empty(self.scales[path], device="meta")
            found |= _specs(self._kv_tensors(path, scale, scale))
        for name in self.source.added.get(unit.name, ()):
            # Scales of a quantized cache belong to the config that declared it, which is not kept.
            linear = by_weight.get(name)
            if linear is not None and self.schemes.linears[linear.name].weight is not None:
                found |= {f"{linear.name}.{n}": spec for n, spec in self._leaves(linear).items()}
            elif linear is not None and self.source.schemes.linears[linear.name].weight is not None:
                found[name] = TensorShape(self.dtype, linear.shape)
            elif not is_cache_scale(name):
                found.setdefault(name, entries[name].spec)
        return found

    def encode(self, unit: Unit) -> dict[str, Tensor]:
        """Raises InputError where a float tensor leaves the range of its dtype on disk."""
        own, others = self.encode_with(unit, ranks=ALONE)
        return own | others

    def encode_with(
        self, unit: Unit, *, ranks: Ranks
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same by several ranks: tensors that this one alone makes, and those that all have.

        Of the second kind is whatever `decode` does not know from codes.
        """
        shapes = self.shapes(unit.layout)
        coded = [x for x in unit.layout.linears if self.schemes.linears[x.name].weight is not None]
        restacked = self._stacked(unit.layout)
        whole = bool(restacked) or any(map(self._is_float, coded))
        own = packed(
            unit,
            coded,
            self.format,
            self.schemes,
            self._leaves,
            dtype=self.dtype,
            stackable=self._stackable,
            whole=whole,
            ranks=ranks,
        )
        own, outputs = ({}, own) if whole else (own, {})
        for path, (keys, values) in unit.kv_scales.items():
            outputs |= self._kv_tensors(path, keys, values)
        floats = dict(unit.extra)
        for stack in restacked:
            present = replaced(unit.tensors, outputs)
            inside, built = self._restacked(unit.layout, stack, present)
            outputs = {name: tensor for name, tensor in outputs.items() if name not in inside}
            floats |= built
        halves = {}
        packs = () if whole else {f"{x.name}.{leaf}" for x in coded for leaf in self._leaves(x)}
        for name, spec in shapes.items():
            if name not in outputs and name not in packs:
                made_of = floats[name] if name in floats else narrow(unit.tensors, name)
                outputs[name] = made_of.to(home_of(unit.tensors, name), spec.dtype)
                if spec.dtype == torch.float16:
                    halves[name] = torch.isfinite(outputs[name]).all()
        lost = [name for name, good in halves.items() if not bool(good)]
        if lost:
            raise InputError(
                f"{lost[0]} holds values beyond the range of float16",
                hint="write bfloat16 (dtype: bfloat16), or use a format that stores it",
            )
        return own, outputs

    def decode(
        self,
        unit: UnitLayout,
        tensors: Mapping[str, Tensor],
        *,
        coded: Mapping[str, QTensor] = NONE,
        ranks: Ranks = ALONE,
    ) -> Unit:
        """The inverse of `encode`.

        coded  weights by the name of their linear, of which it is known what they stand for; none
               of their tensors is looked at, nor scales of their inputs
        """
        refs: dict[str, TensorRef] = {}
        for stack in self._stacked(unit):
            leaves = self._packed_as(unit, stack)
            refs |= self.source.arch.runtime.references(unit, stack, coded=leaves)
        stacks = {ref.name for ref in refs.values()}
        single = {name: tensor for name, tensor in tensors.items() if name not in stacks}
        parts = {name: ref.read(tensors[ref.name]) for name, ref in refs.items()}
        return assembled(
            unit,
            single | parts,
            self.format,
            self.schemes,
            self._leaves,
            coded=coded,
            ranks=ranks,
        )

    def config(self) -> dict[str, Any]:
        """The source's, with what is true of the written files."""
        config = {k: v for k, v in self.source.checkpoint.config.items() if k != "torch_dtype"}
        config.pop("quantization_config", None)
        if "_class_name" not in config:  # diffusers' own configs know no such key
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        stored = self.source.layout.tied is None or self.untied
        if is_tied(config, self.source.arch) == stored:
            config["tie_word_embeddings"] = not stored
        kept = {path: Scheme() for path in self._kept()}
        schemes = replace(self.schemes, linears={**self.schemes.linears, **kept})
        if entry := self.format.config(schemes):
            config["quantization_config"] = entry
        return {**config, **self.entries}

    def files(self) -> dict[str, Any]:
        """What the format's readers want."""
        return self.format.files(self.schemes)

    def float_dtype(self, name: str) -> torch.dtype:
        """Dtype on disk of a float tensor of the source."""
        entry = self.source.checkpoint.entries.get(name)
        kept = not self.recast and self.dtype == self.source.checkpoint.dtype
        if kept and entry is not None and entry.spec.dtype in FLOATS:
            return entry.spec.dtype
        return self.dtype

    def about(self) -> dict[str, Any]:
        """What decides the written bytes beside source, recipe and versions."""
        return {}

    def base_shapes(self, unit: UnitLayout) -> dict[str, TensorShape]:
        """Weights of another model that the written ones are differences to, by their names."""
        return {}

    def base_weights(self, unit: UnitLayout) -> dict[str, Tensor]:
        """Those weights, on the CPU."""
        return {}

    def describe(self, linear: str) -> str:
        """What is written of a linear, in a few words."""
        scheme = self.schemes.linears[linear]
        spec = scheme.weight
        if spec is None:
            return "unchanged"
        shared = {
            "tensor": "per tensor",
            "channel": "per channel",
            "group": f"group {spec.group_size}",
            "block": f"block {spec.block}",
        }[spec.strategy]
        kind = f"int{spec.bits}" if spec.element == "int" else spec.element
        text = f"{kind} {shared} {'symmetric' if spec.symmetric else 'asymmetric'}"
        if scheme.input is not None:
            text += f", inputs {scheme.input.element} per {scheme.input.mode}"
        return text

    def packs(self, linear: Linear) -> bool:
        """Whether a linear has something in the place of its weight, and its inputs stay floats."""
        scheme = self.schemes.linears[linear.name]
        return not self._is_float(linear) and scheme.input is None

    def _leaves(self, linear: Linear) -> dict[str, TensorShape]:
        return _shapes_of(self.format, self.schemes.linears[linear.name], linear.shape, self.dtype)

    def _stackable(self, linear: Linear) -> bool:
        """Whether linears of this shape may be packed one above the other."""
        scheme = self.schemes.linears[linear.name]
        spec = scheme.weight
        if spec is None or scheme.input is not None:
            return False
        if not (spec.rows_apart and self.format.rows_apart):
            return False
        rows, columns = linear.shape
        shapes = partial(_shapes_of, self.format, scheme, dtype=self.dtype)
        one, two = (shapes(shape=(n * rows, columns)) for n in (1, 2))
        return all(
            two[leaf].shape in (spec.shape, (2 * spec.shape[0], *spec.shape[1:]))
            for leaf, spec in one.items()
        )

    def _stacked(self, unit: UnitLayout) -> list[str]:
        """Stacks, of experts for one, that are written as such."""
        stacks = self.source.arch.runtime.stacked(unit)
        return [
            name
            for name, linears in stacks.items()
            if all(map(self._is_float, linears)) or self._packed_as(unit, name)
        ]

    def _packed_as(self, unit: UnitLayout, stack: str) -> tuple[str, ...]:
        """What linears of a stack have in place of weights, where it is written packed."""
        linears = self.source.arch.runtime.stacked(unit)[stack]
        return () if any(map(self._is_float, linears)) else self.format.stacked

    def _restacked(
        self, unit: UnitLayout, stack: str, tensors: Mapping[str, Tensor]
    ) -> tuple[set[str], dict[str, Tensor]]:
        coded = self._packed_as(unit, stack)
        return self.source.arch.runtime.restacked(unit, stack, tensors, coded=coded)

    def _is_float(self, linear: Linear) -> bool:
        """Whether a linear's weight is written as floats."""
        return self.schemes.linears[linear.name].weight is None or [*self._leaves(linear)] == [
            "weight"
        ]

    def _kv_tensors(self, path: str, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        assert self.schemes.kv is not None, f"{path}: scales of a cache that nothing quantizes"
        return self.format.kv_tensors(
            self.schemes.kv, path, k_scale=keys, v_scale=values, model_dtype=self.dtype
        )

    def _kept(self) -> Iterator[str]:
        """Linears that no scheme is of and that loaders see: those that are carried over, and plain
        ones under the names that they have in memory."""
        source, entries = self.source, self.source.checkpoint.entries
        coded = {name for name, scheme in self.schemes.linears.items() if scheme.weight}
        matrices = {n for n, entry in entries.items() if len(entry.spec.shape) == 2}
        matrices |= {linear.weight_name for linear in source.layout.linears if linear.beside}
        carried = [
            path
            for name in source.layout.carried
            if is_weight(name)
            and name in matrices
            and (path := name.rpartition(".")[0]) not in coded
        ]
        yield from carried
        embedding = () if source.arch.free else source.arch.embedding.beside
        yield from (path for path in embedding if weight_name(path) in matrices)
        plain = dict.fromkeys(self.schemes.plain)
        for path in (*carried, *plain):
            for other, ours in source.arch.prefixes.items():
                if path.startswith(ours):
                    yield other + path.removeprefix(ours)
        for unit in () if source.arch.free else source.layout.units:
            for linear in unit.linears:
                if linear.name in plain and linear.expert is None:
                    yield source.arch.runtime.memory_path(unit, linear)


@lru_cache(maxsize=1024)  # tens of thousands of experts are alike
def _shapes_of(
    format: Format, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, TensorShape]:
    assert scheme.weight is not None
    return format.layout(scheme.weight, shape, model_dtype=dtype, input=scheme.input)


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorShape]:
    return {name: TensorShape(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
