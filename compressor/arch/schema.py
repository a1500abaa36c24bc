"""What a map file may say, and the names a runtime knows a model's parts by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from compressor.ir.layout import Linear, UnitLayout

# What a row of a map may measure in; q, kv, qkv and gate_up follow from the others.
Size = Literal[
    "hidden", "vocab", "q", "kv", "qkv", "head_dim", "ff", "gate_up", "moe_ff", "experts"
]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SizeKeys(_Row):
    """The config keys that hold the model's sizes; of several keys the first one present counts."""

    layers: str
    hidden: str
    vocab: str
    heads: str
    kv_heads: str | None = None
    head_dim: str | None = None
    ff: str | None = None
    moe_ff: str | None = None
    experts: str | tuple[str, ...] | None = None


class Requirement(_Row):
    """A config key that, where it is given, must have this value (or be this size)."""

    key: str
    value: bool | int | str | None = None
    size: Size | None = None


class NormRow(_Row):
    """A norm; `offset` is 1.0 where it multiplies by (1 + weight)."""

    name: str
    role: str
    size: Size
    offset: float = 0.0


class LinearRow(_Row):
    """A linear; "{e}" in its name makes one for each expert. `fused` is the runtime's module."""

    name: str
    role: str
    site: str
    shape: tuple[Size, Size]
    parts: dict[str, Size] = Field(default_factory=dict)
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
    when: dict[str, str] = Field(default_factory=dict)


class Section(_Row):
    """A part of a block. A section with `has` is for blocks in which that module has a weight."""

    has: str | None = None
    norms: tuple[NormRow, ...] = ()
    linears: tuple[LinearRow, ...]
    folds: tuple[FoldRow, ...] = ()

    @model_validator(mode="after")
    def _folds_have_ends(self) -> Self:
        parts = {row.name: set(row.parts) for row in self.linears} | {
            row.name: set() for row in self.norms
        }
        for fold in self.folds:
            if fold.site not in {row.site for row in self.linears}:
                raise ValueError(f"no linear reads the site {fold.site!r} of a fold")
            if fold.source not in parts:
                raise ValueError(
                    f"the fold into {fold.site} has the unknown source {fold.source!r}"
                )
            if fold.part is not None and fold.part not in parts[fold.source]:
                raise ValueError(f"{fold.source} has no part {fold.part!r}")
        return self


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

    into     name of the tensor, relative to the decoder layer
    sources  checkpoint modules whose rows follow one another, with "{e}" for the expert
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    into: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RuntimeNames:
    """Where the model in memory keeps its parts, and how a block's tensors get there.

    layers, embedding, norm, lm_head  module paths; `layers` is the list of decoder layers
    renames  module path in the checkpoint → in memory, both relative to the decoder layer
    stacks   experts that are one tensor in memory
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layers: str
    embedding: str
    norm: str
    lm_head: str
    renames: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()

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
            names = [
                [f"{unit.name}.{source.format(e=e)}.weight" for source in stack.sources]
                for e in range(experts)
            ]
            first = [tensors[name] for name in names[0]]
            rows = sum(tensor.shape[0] for tensor in first)
            if any(tensors[name].requires_grad for expert in names for name in expert):
                every = [torch.cat([tensors[name] for name in names[e]]) for e in range(experts)]
                state[stack.into] = torch.stack(every)
            else:
                out = first[0].new_empty(experts, rows, first[0].shape[1])
                for e in range(experts):
                    torch.cat([tensors[name] for name in names[e]], out=out[e])
                state[stack.into] = out
            stacked.update(name for expert in names for name in expert)
        for name in unit.tensors:
            if name not in stacked:
                path, _, leaf = name.removeprefix(f"{unit.name}.").rpartition(".")
                state[f"{self.module_path(path)}.{leaf}"] = tensors[name]
        return state


class MapFile(_Row):
    """One map file.

    biases  module, named as in its row → whether it has a bias: always, or as a config key says;
            modules that are not named have none
    """

    model_type: str
    sizes: SizeKeys
    defaults: dict[str, bool | int | str] = Field(default_factory=dict)
    require: tuple[Requirement, ...] = ()
    embedding: EmbeddingRow
    layer: str
    attention: Section
    mlp: tuple[Section, ...] = Field(min_length=1)
    head: HeadRow
    biases: dict[str, bool | str] = Field(default_factory=dict)
    runtime: RuntimeNames

    def has_module(self, path: str) -> bool:
        """Whether a checkpoint of this architecture may have a module of that path."""
        return self._modules.fullmatch(path) is not None

    @cached_property
    def _modules(self) -> re.Pattern[str]:
        sections = (self.attention, *self.mlp)
        rows = [row.name for section in sections for row in section.norms]
        rows += [row.name for section in sections for row in section.linears]
        fixed = [self.embedding.token, self.embedding.position, self.head.norm.name]
        paths = [path for path in (*fixed, self.head.linear) if path is not None]
        paths += [f"{self.layer}.{name}" for name in rows]
        patterns = (re.escape(path).replace(r"\{i\}", r"\d+") for path in paths)
        return re.compile("|".join(p.replace(r"\{e\}", r"\d+") for p in patterns))
