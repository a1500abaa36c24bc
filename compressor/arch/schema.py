"""What a map file may say, and the names a runtime knows a model's parts by."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from compressor.ir.layout import Linear, Rows, TensorRef, UnitLayout, bias_name, weight_name

Size = Annotated[str, Field(pattern=r"^\w+(\*\w+)*( \+ \w+(\*\w+)*)*$")]
"""What a row of a map measures in: a name under `sizes`, q, kv, qkv (of all heads) or gate_up, or a
sum of products of them and of numbers, as in "2*ff" or "kv_lora + rope"."""

Value = bool | int | str | None
"""What a map compares a value of config.json with."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Requirement(_Row):
    """A config key that, where it is given, must have this value (or be this size)."""

    key: str
    value: Value = None
    size: Size | None = None


class NormRow(_Row):
    """A norm; `offset` is 1.0 where it multiplies by (1 + weight), `kind` layer where it subtracts
    the mean."""

    name: str
    role: str
    size: Size
    offset: float = 0.0
    kind: Literal["rms", "layer"] = "rms"


class LinearRow(_Row):
    """A linear; "{e}" in its name makes one for each expert. `fused` is the runtime's module.

    parts  role → rows, one range after the other;  per  how many times they alternate (per head)
    """

    name: str
    role: str
    site: str
    shape: tuple[Size, Size]
    parts: dict[str, Size] = Field(default_factory=dict)
    per: Size | None = None
    fused: str = ""


class FoldRow(_Row):
    """A norm or linear whose output scale the site's linears can take over.

    part      the source's rows that make the input, where the source is fused
    per_head  the source's heads may be read by several query heads each
    when      config values under which the fold is exact
    """

    site: str
    source: str
    part: str | None = None
    per_head: bool = False
    when: dict[str, Value] = Field(default_factory=dict)


class Section(_Row):
    """A part of a block. A section with `has` is for blocks in which that module has a weight.

    mixer   of a section of attention: what it mixes tokens with
    pairs   which channels of a head RoPE turns together
    others  tensors of no linear and no norm, by their whole names in the block
    """

    has: str | None = None
    mixer: Literal["self", "latent", "linear"] = "self"
    pairs: Literal["halves", "neighbours"] = "halves"
    norms: tuple[NormRow, ...] = ()
    linears: tuple[LinearRow, ...]
    others: tuple[str, ...] = ()
    folds: tuple[FoldRow, ...] = ()


class EmbeddingRow(_Row):
    """Modules of the embedding unit; `token` is the one a tied head shares."""

    token: str
    position: str | None = None


class HeadRow(_Row):
    """Modules of the head unit."""

    norm: NormRow
    linear: str


@dataclass(frozen=True, slots=True)
class Stack:
    """Experts that memory keeps in one tensor: [experts, rows of all sources, columns].

    A checkpoint may hold it so too, under that name, in place of one tensor for each expert.

    into         name of the tensor, relative to the decoder layer
    sources      checkpoint modules whose rows follow one another, with "{e}" for the expert
    transposed   [experts, columns, rows] instead
    interleaved  the sources' rows alternate instead
    bias         name of the tensor of their biases [experts, rows]
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    into: str
    sources: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    bias: str | None = None

    def reference(self, block: str, expert: int, source: int, rows: int) -> TensorRef:
        """Where a stack on disk has the weight of one of `sources`, of so many rows."""
        pattern = self._rows(source, rows)
        return TensorRef(f"{block}.{self.into}", expert, self.transposed, pattern)

    def bias_reference(self, block: str, expert: int, source: int, rows: int) -> TensorRef | None:
        """The same for its bias."""
        if self.bias is None:
            return None
        return TensorRef(f"{block}.{self.bias}", expert, rows=self._rows(source, rows))

    def _rows(self, source: int, rows: int) -> Rows | None:
        count = len(self.sources)
        if count == 1:
            return None
        if self.interleaved:
            return Rows("", source, 1, outer=rows, stride=count)
        return Rows("", source * rows, rows)

    def build(self, block: str, experts: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stack's tensors, by name relative to the block, from those of its linears."""
        found = {self.into: self._stacked(block, experts, tensors, weight_name)}
        if self.transposed:
            found[self.into] = found[self.into].transpose(1, 2).contiguous()
        if self.bias is not None:
            found[self.bias] = self._stacked(block, experts, tensors, bias_name)
        return found

    def takes(self, block: str, experts: int) -> Iterator[str]:
        """Names of the tensors that it is built from."""
        for e in range(experts):
            for source in self.sources:
                yield weight_name(f"{block}.{source.format(e=e)}")
                if self.bias is not None:
                    yield bias_name(f"{block}.{source.format(e=e)}")

    def _stacked(
        self,
        block: str,
        experts: int,
        tensors: Mapping[str, Tensor],
        name: Callable[[str], str],
    ) -> Tensor:
        names = [
            [name(f"{block}.{source.format(e=e)}") for source in self.sources]
            for e in range(experts)
        ]
        first = [tensors[n] for n in names[0]]
        rows = sum(tensor.shape[0] for tensor in first)
        if any(tensors[n].requires_grad for expert in names for n in expert):
            out = torch.stack([torch.cat([tensors[n] for n in expert]) for expert in names])
        else:
            out = first[0].new_empty(experts, rows, *first[0].shape[1:])
            for e, expert in enumerate(names):
                torch.cat([tensors[n] for n in expert], out=out[e])
        if self.interleaved:
            apart = out.view(experts, len(self.sources), -1, *out.shape[2:])
            out = apart.transpose(1, 2).reshape(out.shape)
        return out


@dataclass(frozen=True, slots=True)
class RuntimeNames:
    """Where the model in memory keeps its parts, and how a block's tensors get there.

    layers, embedding, norm, lm_head  module paths; `layers` is the list of decoder layers
    renames  module path in the checkpoint → in memory, both relative to the decoder layer
    outside  the same for modules outside the blocks
    stacks   experts that are one tensor in memory
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layers: str
    embedding: str
    norm: str
    lm_head: str
    renames: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()

    def restacked(
        self, unit: UnitLayout, name: str, tensors: Mapping[str, Tensor]
    ) -> tuple[set[str], dict[str, Tensor]]:
        """Names of the tensors that a stack of the checkpoint holds, and the stack (with that of
        its biases) built from them."""
        experts = len({linear.expert for linear in unit.linears} - {None})
        stack = next(x for x in self.stacks if f"{unit.name}.{x.into}" == name)
        built = stack.build(unit.name, experts, tensors)
        return set(stack.takes(unit.name, experts)), {
            f"{unit.name}.{local}": tensor for local, tensor in built.items()
        }

    def outer_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the embedding and the head under their names in memory."""
        state = {}
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            state[f"{self.outside.get(path, path)}.{leaf}"] = tensor
        return state

    def module_path(self, path: str) -> str:
        """A checkpoint module's path in memory, both relative to the decoder layer."""
        return self.renames.get(path, path)

    def linear_path(self, unit: UnitLayout, linear: Linear) -> str:
        """Path, relative to the decoder layer, of the module that computes a block's linear.

        For an expert that is the module that holds all experts.
        """
        path = linear.name.removeprefix(f"{unit.name}.")
        if linear.expert is not None:
            for stack in self.stacks:
                if path in (source.format(e=linear.expert) for source in stack.sources):
                    return stack.into.rpartition(".")[0]
        return self.module_path(path)

    def block_state(self, unit: UnitLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of one decoder layer, names relative to it, experts stacked.

        tensors  checkpoint name → tensor, at least those of `unit`; what is not stacked is passed
                 on without a copy
        """
        experts = len({linear.expert for linear in unit.linears} - {None})
        state: dict[str, Tensor] = {}
        stacked: set[str] = set()
        for stack in self.stacks if experts else ():
            state |= stack.build(unit.name, experts, tensors)
            stacked.update(stack.takes(unit.name, experts))
        for name in unit.tensors:
            if name not in stacked:
                path, _, leaf = name.removeprefix(f"{unit.name}.").rpartition(".")
                state[f"{self.module_path(path)}.{leaf}"] = tensors[name]
        return state


class MapFile(_Row):
    """One map file.

    config    the part of config.json that describes the text model, where it is nested
    sizes     name → config key that holds it; of several keys the first one present counts. A map
              has at least layers, hidden, vocab and heads
    prefixes  other prefixes of names in files → the map's
    biases    module, named as in its row → whether it has a bias: always, or as a config key says;
              modules that are not named have none
    folds     those between sections of a block
    carried   patterns of names that are written as they are ({layers}: how many there are)
    """

    model_type: str
    config: str | None = None
    sizes: dict[str, str | tuple[str, ...]]
    defaults: dict[str, bool | int | str] = Field(default_factory=dict)
    require: tuple[Requirement, ...] = ()
    prefixes: dict[str, str] = Field(default_factory=dict)
    embedding: EmbeddingRow
    layer: str
    attention: tuple[Section, ...] = Field(min_length=1)
    mlp: tuple[Section, ...] = Field(min_length=1)
    folds: tuple[FoldRow, ...] = ()
    head: HeadRow
    biases: dict[str, bool | str] = Field(default_factory=dict)
    carried: tuple[str, ...] = ()
    runtime: RuntimeNames

    @field_validator("sizes")
    @classmethod
    def _has_the_needed_sizes(
        cls, sizes: dict[str, str | tuple[str, ...]]
    ) -> dict[str, str | tuple[str, ...]]:
        lacking = {"layers", "hidden", "vocab", "heads"} - sizes.keys()
        if lacking:
            raise ValueError(f"no config key for {', '.join(sorted(lacking))}")
        return sizes

    @model_validator(mode="after")
    def _folds_have_ends(self) -> Self:
        sections = (*self.attention, *self.mlp)
        for section in sections:
            _check_folds(section.folds, [section])
        _check_folds(self.folds, sections)
        return self

    def value(self, config: Mapping[str, Any], key: str) -> Any:
        """What config.json says of the text model, or what the family takes where it is silent."""
        nested = config.get(self.config) if self.config is not None else None
        for place in (nested if isinstance(nested, dict) else {}, config):
            if place.get(key) is not None:
                return place[key]
        return self.defaults.get(key)

    def has_module(self, path: str) -> bool:
        """Whether a checkpoint of this architecture may have a module of that path."""
        return self._modules.fullmatch(path) is not None

    @cached_property
    def _modules(self) -> re.Pattern[str]:
        sections = (*self.attention, *self.mlp)
        rows = [row.name for section in sections for row in section.norms]
        rows += [row.name for section in sections for row in section.linears]
        rows += [name.rpartition(".")[0] for section in sections for name in section.others]
        rows += [stack.into.rpartition(".")[0] for stack in self.runtime.stacks]
        fixed = [self.embedding.token, self.embedding.position, self.head.norm.name]
        paths = [path for path in (*fixed, self.head.linear) if path is not None]
        paths += [f"{self.layer}.{name}" for name in rows]
        patterns = (re.escape(path).replace(r"\{i\}", r"\d+") for path in paths)
        return re.compile("|".join(p.replace(r"\{e\}", r"\d+") for p in patterns))


def _check_folds(folds: Sequence[FoldRow], sections: Sequence[Section]) -> None:
    """Raises ValueError for a fold without a source or without a reader."""
    parts: dict[str, set[str]] = {}
    for section in sections:
        parts |= {row.name: set(row.parts) for row in section.linears}
        parts |= {row.name: set() for row in section.norms}
    sites = {row.site for section in sections for row in section.linears}
    for fold in folds:
        if fold.site not in sites:
            raise ValueError(f"no linear reads the site {fold.site!r} of a fold")
        if fold.source not in parts:
            raise ValueError(f"the fold into {fold.site} has the unknown source {fold.source!r}")
        if fold.part is not None and fold.part not in parts[fold.source]:
            raise ValueError(f"{fold.source} has no part {fold.part!r}")
