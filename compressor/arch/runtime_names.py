"""The names by which a model in memory knows its parts, and experts that it keeps in one tensor."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from compressor.ir.floats import elsewhere, room_for
from compressor.ir.layout import Linear, Rows, TensorRef, UnitLayout, bias_name, weight_name
from compressor.ir.same_shape import STACKS

Handing = Mapping[str, int | Literal["tokens", "filled"]]
"""Argument of a block → where it comes from: a place in the outputs of the block before; the tokens
of its rows, of which the model makes a value for each block; a mapping that blocks fill and read.
"""


@dataclass(frozen=True, slots=True)
class Stack:
    """Experts that memory keeps in one tensor: [experts, rows of all sources, columns].

    A checkpoint may hold it so too, in place of one tensor for each expert.

    into         name of the tensor in memory, relative to the decoder layer
    sources      checkpoint modules whose rows follow one another, with "{e}" for the expert
    transposed   [experts, columns, rows] instead
    interleaved  the sources' rows alternate instead
    bias         name of the tensor of their biases [experts, rows]
    stored       name of the tensor in a checkpoint, where that is another one
    either       a checkpoint may hold it transposed, which its shape shows
    only         files of floats hold it so and in no other way: nobody loads them one by one
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    into: str
    sources: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    bias: str | None = None
    stored: str | None = None
    either: bool = False
    only: bool = False

    @property
    def on_disk(self) -> str:
        """Its name in a checkpoint, relative to the block."""
        return self.stored or self.into

    def turned(self, found: Sequence[int] | None, shape: tuple[int, int, int]) -> bool:
        """Whether a checkpoint has it [experts, columns, rows]: its shape there, and [experts,
        rows, columns]."""
        if self.either:
            return found is not None and tuple(found) != shape
        return self.transposed

    def reference(
        self, block: str, expert: int, source: int, rows: int, *, transposed: bool
    ) -> TensorRef:
        """Where a stack on disk has the weight of one of `sources`, of so many rows."""
        pattern = self._rows(source, rows)
        return TensorRef(f"{block}.{self.on_disk}", expert, transposed, pattern)

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

    def build(
        self,
        block: str,
        experts: Iterable[int],
        tensors: Mapping[str, Tensor],
        *,
        into: str,
        transposed: bool,
    ) -> dict[str, Tensor]:
        """The stack's tensors, by name relative to the block, from those of these experts'
        linears."""
        found = {into: self._stacked(block, experts, tensors, weight_name)}
        if transposed:
            found[into] = found[into].transpose(1, 2).contiguous()
        if self.bias is not None:
            found[self.bias] = self._stacked(block, experts, tensors, bias_name)
        return found

    def build_coded(
        self, block: str, experts: int, tensors: Mapping[str, Tensor], *, leaves: Sequence[str]
    ) -> tuple[set[str], dict[str, Tensor]]:
        """Names of packed linears' tensors, and the stacks of each of `leaves` and of the biases
        built from them, by name relative to the block. Each is [rows, ...] of a linear."""
        stacks = {leaf: f"{self.on_disk}_{leaf}" for leaf in leaves}
        stacks |= {} if self.bias is None else {"bias": self.bias}
        paths = [f"{block}.{x.format(e=e)}" for e in range(experts) for x in self.sources]
        built = {
            into: self._stacked(block, range(experts), tensors, _named(leaf))
            for leaf, into in stacks.items()
        }
        return {f"{path}.{leaf}" for path in paths for leaf in stacks}, built

    def takes(self, block: str, experts: int) -> Iterator[str]:
        """Names of the tensors that it is built from."""
        for e in range(experts):
            for source in self.sources:
                yield weight_name(f"{block}.{source.format(e=e)}")
                if self.bias is not None:
                    yield bias_name(f"{block}.{source.format(e=e)}")

    def room(
        self,
        block: str,
        experts: Sequence[int],
        tensors: Mapping[str, Tensor],
        device: torch.device,
    ) -> dict[str, Tensor]:
        """Memory on a device for the weights that it is built from, laid out so that building it
        takes no copy; they themselves where they lie so already, and none where it has them
        otherwise than one after the other."""
        if self.interleaved or self.transposed:
            return {}
        names = self._names(block, experts, weight_name)
        first = [tensors[n] for n in names[0]]
        rows = [tensor.shape[0] for tensor in first]
        if any(tensors[n].dtype != first[0].dtype for expert in names for n in expert):
            return {}
        if first[0].device == device and _placed(first[0], names, tensors, sum(rows)) is not None:
            return {n: tensors[n] for expert in names for n in expert}
        shape = len(names), sum(rows), first[0].shape[1]
        out = torch.empty(shape, dtype=first[0].dtype, device=device)
        return {
            n: part
            for e, expert in enumerate(names)
            for n, part in zip(expert, torch.split(out[e], rows), strict=True)
        }

    def _names(
        self, block: str, experts: Iterable[int], name: Callable[[str], str]
    ) -> list[list[str]]:
        return [[name(f"{block}.{source.format(e=e)}") for source in self.sources] for e in experts]

    def _stacked(
        self,
        block: str,
        experts: Iterable[int],
        tensors: Mapping[str, Tensor],
        name: Callable[[str], str],
    ) -> Tensor:
        names = self._names(block, experts, name)
        first = [tensors[n] for n in names[0]]
        rows = sum(tensor.shape[0] for tensor in first)
        if (placed := _placed(first[0], names, tensors, rows)) is not None:
            return placed
        out = first[0].new_empty(len(names), rows, *first[0].shape[1:])
        step = max(1, len(names) // STACKS)  # so many are made for it at a time, where they are
        for e in range(0, len(names), step):
            parts = [tensors[n] for expert in names[e : e + step] for n in expert]
            if any(part.requires_grad for part in parts):
                out = torch.stack([torch.cat([tensors[n] for n in expert]) for expert in names])
                break
            torch.cat(parts, out=out[e : e + step].flatten(0, 1))
        if self.interleaved:
            apart = out.view(len(names), len(self.sources), -1, *out.shape[2:])
            out = apart.transpose(1, 2).reshape(out.shape)
        return out


def _named(leaf: str) -> Callable[[str], str]:
    return lambda path: f"{path}.{leaf}"


def _placed(
    first: Tensor, names: list[list[str]], tensors: Mapping[str, Tensor], rows: int
) -> Tensor | None:
    """The stack that tensors lie in already, as `Stack.place` lays them; None where they do not."""
    whole = first._base
    if whole is None or whole.shape != (len(names), rows, *first.shape[1:]):
        return None
    place = whole.data_ptr()
    for n in (n for expert in names for n in expert):
        part = tensors[n]
        if part._base is not whole or not part.is_contiguous() or part.data_ptr() != place:
            return None
        place += part.nbytes
    return whole


@dataclass(frozen=True, slots=True)
class RuntimeNames:
    """Where the model in memory keeps its parts, and how a block's tensors get there.

    layers, embedding, norm, lm_head  module paths; `layers` is the list of decoder layers
    renames  module path or tensor in the checkpoint → in memory, relative to the decoder layer
    joined   tensor in memory → those of the checkpoint whose rows follow one another in it
    outside  the same for modules outside the blocks
    stacks   experts that are one tensor in memory
    twin     the model_type whose class runs it, where transformers has none of its own
    within   the part of the config that this class takes, where that is not all of it
    twin_config  what it takes beside
    handed   what a layer is given beside hidden states that earlier units made
    logit_scale  what logits are multiplied with, where the map says it
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layers: str
    embedding: str
    norm: str
    lm_head: str
    renames: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    twin: str | None = None
    within: str | None = None
    twin_config: Mapping[str, float] = field(default_factory=dict)
    handed: Handing = field(default_factory=dict)
    logit_scale: float | None = None

    def stacked(self, unit: UnitLayout) -> dict[str, tuple[Linear, ...]]:
        """Tensors in which files of floats have linears of a unit otherwise than one [out, in] →
        those linears."""
        found = unit.stacks
        experts = {x.weight_name: x for x in unit.linears if x.expert is not None}
        for stack in self.stacks if experts else ():
            if stack.only:
                names = stack.takes(unit.name, len({x.expert for x in experts.values()}))
                parts = tuple(experts[name] for name in names if name in experts)
                found.setdefault(f"{unit.name}.{stack.on_disk}", parts)
        return found

    def restacked(
        self,
        unit: UnitLayout,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        coded: Sequence[str] = (),
    ) -> tuple[set[str], dict[str, Tensor]]:
        """Names of the tensors that a stack of the checkpoint holds, and the stack (with that of
        its biases) built from them.

        coded  what each linear has in place of its weight, where it is packed: there is a stack
               STACK_LEAF of each, rows first
        """
        first = self.stacked(unit)[name][0]
        if first.expert is None:
            return {first.weight_name}, {name: tensors[first.weight_name].T.contiguous()}
        stack, experts = self._stack(unit, name)
        if coded:
            taken, built = stack.build_coded(unit.name, experts, tensors, leaves=coded)
            return taken, {f"{unit.name}.{local}": tensor for local, tensor in built.items()}
        turned = self._turned(stack, first)
        built = stack.build(
            unit.name, range(experts), tensors, into=stack.on_disk, transposed=turned
        )
        return set(stack.takes(unit.name, experts)), {
            f"{unit.name}.{local}": tensor for local, tensor in built.items()
        }

    def references(
        self, unit: UnitLayout, name: str, *, coded: Sequence[str] = ()
    ) -> dict[str, TensorRef]:
        """Where such a stack has the tensors that it is built from; `coded` as in `restacked`."""
        found: dict[str, TensorRef] = {}
        for linear in self.stacked(unit)[name]:
            expert, rows = linear.expert, linear.out_features
            if expert is None:
                return {linear.weight_name: TensorRef(name, transposed=True)}
            stack, _ = self._stack(unit, name)
            paths = [f"{unit.name}.{source.format(e=expert)}" for source in stack.sources]
            place, turned = paths.index(linear.name), self._turned(stack, linear)
            weight = stack.reference(unit.name, expert, place, rows, transposed=turned)
            bias = stack.bias_reference(unit.name, expert, place, rows)
            if coded:
                part = replace(weight, transposed=False)
                for leaf in coded:
                    found[f"{linear.name}.{leaf}"] = replace(part, name=f"{name}_{leaf}")
                found |= {linear.bias_name: bias} if bias else {}
                continue
            found |= {linear.weight_name: weight} | ({linear.bias_name: bias} if bias else {})
        return found

    def _stack(self, unit: UnitLayout, name: str) -> tuple[Stack, int]:
        experts = unit.experts
        return next(x for x in self.stacks if f"{unit.name}.{x.on_disk}" == name), experts

    @staticmethod
    def _turned(stack: Stack, linear: Linear) -> bool:
        ref = linear.tensor
        return stack.transposed if ref is None or ref.index is None else ref.transposed

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

    def memory_path(self, unit: UnitLayout, linear: Linear) -> str:
        """Path in the whole model of the module that computes a linear."""
        if unit.kind == "block":
            return f"{self.layers}.{unit.index}.{self.linear_path(unit, linear)}"
        return self.outside.get(linear.name, linear.name)

    def room(
        self, unit: UnitLayout, tensors: Mapping[str, Tensor], device: torch.device
    ) -> dict[str, Tensor]:
        """Memory on a device for a block's tensors, experts as parts of the stacks of
        `block_state`; those that are there as it wants them, or another rank's, as they are."""
        found: dict[str, Tensor] = {}
        for stack in self.stacks if (held := self.held(unit, tensors)) else ():
            found |= stack.room(unit.name, held, tensors, device)
        return found | room_for({n: t for n, t in tensors.items() if n not in found}, device)

    def held(self, unit: UnitLayout, tensors: Mapping[str, Tensor]) -> list[int]:
        """The experts of a block whose weights are here, and no other rank's; all of them where
        there are but shapes."""
        first: dict[int, str] = {}
        for linear in unit.linears:
            if linear.expert is not None:
                first.setdefault(linear.expert, linear.weight_name)
        here = sorted(e for e, name in first.items() if not elsewhere(tensors, name))
        return here or sorted(first)

    @property
    def expert_modules(self) -> list[str]:
        """Paths of the modules that hold all experts, relative to the decoder layer."""
        return [*dict.fromkeys(stack.into.rpartition(".")[0] for stack in self.stacks)]

    @property
    def expert_stacks(self) -> list[str]:
        """Their tensors, relative to the decoder layer."""
        return [name for stack in self.stacks for name in (stack.into, stack.bias) if name]

    def expert_state(
        self, unit: UnitLayout, tensors: Mapping[str, Tensor], experts: Iterable[int]
    ) -> dict[str, Tensor]:
        """The stacks of some experts of a block, by name relative to the decoder layer."""
        state: dict[str, Tensor] = {}
        some = list(experts)
        for stack in self.stacks if some else ():
            into, transposed = stack.into, stack.transposed
            state |= stack.build(unit.name, some, tensors, into=into, transposed=transposed)
        return state

    def block_state(
        self, unit: UnitLayout, tensors: Mapping[str, Tensor], *, experts: bool = True
    ) -> dict[str, Tensor]:
        """The state dict of one decoder layer, names relative to it, experts stacked.

        tensors  checkpoint name → tensor, at least those of `unit`; what is not stacked is passed
                 on without a copy
        experts  whether their stacks are in it
        """
        count = unit.experts
        state = self.expert_state(unit, tensors, range(count)) if experts else {}
        stacked: set[str] = set()
        for stack in self.stacks if count else ():
            stacked.update(stack.takes(unit.name, count))
        turned = {linear.weight_name for linear in unit.linears if linear.transposed}
        for name in unit.tensors:
            if name not in stacked:
                own = name.removeprefix(f"{unit.name}.")
                path, _, leaf = own.rpartition(".")
                local = f"{self.module_path(path)}.{leaf}".removeprefix(".")
                local = self.renames.get(own, local)
                state[local] = tensors[name].T if name in turned else tensors[name]
        for into, sources in self.joined.items():
            if all(source in state for source in sources):
                state[into] = torch.cat([state.pop(source) for source in sources])
        return state
