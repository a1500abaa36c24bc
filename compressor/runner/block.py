"""A decoder layer that is loaded: its weights, its forward, and the modules of its linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressor.errors import InputError
from compressor.ir.layout import Linear, UnitLayout
from compressor.runner.buffers import unload
from compressor.runner.expert_groups import ExpertGroups
from compressor.runner.experts import Experts, experts_of, hold_some, run_in_groups
from compressor.runner.handed import argument_of, made, still_handed, taken

if TYPE_CHECKING:
    from compressor.runner.block_runner import BlockRunner


@dataclass(slots=True)
class Block:
    """A decoder layer whose weights are in memory."""

    runner: BlockRunner
    unit: UnitLayout
    layer: nn.Module
    tensors: Mapping[str, Tensor]
    handed: dict[str, Tensor] = field(default_factory=dict)
    """What it handed on for the rows that ran last, as in `Stream`."""
    groups: dict[nn.Module, ExpertGroups] = field(default_factory=dict)
    """Modules of experts of which some are in memory at a time."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the layer other weights: checkpoint name → tensor, at least those of the unit."""
        unit, names, limit = self.unit, self.runner.names, self.runner.experts
        apart = (size := limit(unit) if limit else unit.experts) < unit.experts
        held = names.held(unit, tensors)
        apart = apart or len(held) < unit.experts
        ready = self._placed(names.block_state(unit, tensors, experts=not apart))
        if len(held) < unit.experts:
            own = self._placed(names.expert_state(unit, tensors, held))
            some = range(held[0], held[-1] + 1)
            self.groups = hold_some(self.layer, names.expert_modules, own, some)
        elif apart:
            self.groups = run_in_groups(
                self.layer,
                names.expert_modules,
                lambda some: self._placed(names.expert_state(unit, tensors, some)),
                count=unit.experts,
                size=size,
            )
        if apart:
            ready |= {name: self.layer.get_parameter(name) for name in names.expert_stacks}
        self.layer.load_state_dict(ready, strict=True, assign=True)

    def unload(self) -> None:
        """Take the weights away."""
        while self.groups:
            del self.groups.popitem()[0].forward
        unload(self.layer)

    def experts(self, module: nn.Module) -> Experts:
        """The experts of one of the layer's modules, one at a time."""
        return experts_of(module, self.groups.get(module))

    def _placed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        runner = self.runner
        return {n: t.to(runner.device, runner.dtype_of(n)) for n, t in state.items()}

    @torch.no_grad()
    def forward(self, hidden: Tensor, side: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output for hidden states [rows, length, hidden], and what the rows have
        beside them (`Stream.beside`)."""
        with self.runner.products():
            return self._run({}, hidden, side)

    def functional(
        self,
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        side: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """`forward` under other weights, named as in `load`, through which gradients flow."""
        device, dtype = self.runner.device, self.runner.dtype
        state = self.runner.names.block_state(self.unit, tensors).items()
        return self._run({n: t.to(device, dtype) for n, t in state}, hidden, side)

    def _run(
        self, state: dict[str, Tensor], hidden: Tensor, side: Mapping[str, Tensor] | None
    ) -> Tensor:
        rows, length = hidden.shape[:2]
        names, side = self.runner.names.handed, side or {}
        before = {name: x for name, x in side.items() if argument_of(name) in names}
        own = {name: tensor for name, tensor in side.items() if name not in before}
        arguments = self.runner.arguments(self.unit.index, length, own, rows=rows)
        if names:
            arguments = arguments | taken(names, self.unit.index, self.runner.here(before))
        hidden = hidden.to(self.runner.device, self.runner.dtype)
        out = functional_call(self.layer, state, (hidden,), arguments)
        # Decoder layers return a tensor in new transformers and a tuple in old ones.
        outputs = out if isinstance(out, tuple) else (out,)
        places = [place for place in names.values() if isinstance(place, int)]
        if any(not 0 < place < len(outputs) for place in places):
            raise InputError(
                f"the map says handed: {dict(names)}, "
                f"{self.unit.name} gives {len(outputs)} outputs",
                hint="it names an argument of a block, and which output of the one before it is, "
                "from 1",
            )
        if names:
            own = still_handed(names, self.unit.index, before)
            self.handed = {**own, **made(names, arguments, outputs, before)}
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def module(self, linear: Linear) -> nn.Module:
        """The module that plays a linear in memory."""
        return self.layer.get_submodule(self.runner.names.linear_path(self.unit, linear))
