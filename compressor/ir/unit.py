"""One unit of a model while it is worked on: its tensors, and what became of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compressor.ir.floats import Change, Floats, MadeWhenRead, elsewhere, home_of, narrow, replaced
from compressor.ir.layout import Linear, UnitLayout, weight_name
from compressor.ir.qtensor import QTensor
from compressor.ir.same_shape import of_one_shape, stacked


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of the model while passes work on it.

    tensors       checkpoint name → float tensor; linears that became QTensors are no longer in it
    quantized     module path of a linear → its QTensor
    extra         tensors a pass adds to the checkpoint, by their full name
    input_scales  module path of a linear → static scale of its input, float32 [1], a multiplier
    kv_scales     path of an attention module → static scales of keys after RoPE and of values,
                  float32 multipliers [1] or [kv_heads]
    divisors      input site → what its input has been divided by since the source, [in]
    """

    layout: UnitLayout
    tensors: Mapping[str, Tensor]
    quantized: Mapping[str, QTensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)
    kv_scales: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    divisors: Mapping[str, Tensor] = field(default_factory=dict)

    def weight(self, linear: Linear) -> Tensor:
        """The float weight [out, in] of a linear that is not quantized yet."""
        return self.tensors[linear.weight_name]

    def narrow_weight(self, linear: Linear) -> Tensor:
        """The same values, in a narrower dtype where they are held in one."""
        return narrow(self.tensors, linear.weight_name)

    def weights(self, linears: Sequence[Linear]) -> Tensor:
        """Those of linears of one shape, [E, out, in]."""
        names = [linear.weight_name for linear in linears]
        if isinstance(self.tensors, Floats):
            return self.tensors.stacked(names)
        return stacked([self.tensors[name] for name in names])

    def bias(self, linear: Linear) -> Tensor | None:
        """The bias [out] of a linear, or None."""
        return self.tensors.get(linear.bias_name)

    def has_weight(self, path: str) -> bool:
        """Whether the module at `path` has a weight that is still in float."""
        return weight_name(path) in self.tensors

    def with_weight(self, linear: Linear, weight: Tensor) -> Unit:
        """This unit with a linear's float weight [out, in] replaced."""
        return self.with_tensors({linear.weight_name: weight})

    def with_changes(self, changes: Mapping[str, Change]) -> Unit:
        """This unit with something done to some float tensors, where that can wait until they are
        read."""
        if isinstance(self.tensors, Floats):
            return replace(self, tensors=self.tensors.changed(changes))
        return self.with_tensors({name: done(self.tensors[name]) for name, done in changes.items()})

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Unit:
        """This unit with some float tensors replaced."""
        return replace(self, tensors=replaced(self.tensors, changed))

    def with_extra(self, added: Mapping[str, Tensor]) -> Unit:
        """This unit with tensors added, by full name."""
        return replace(self, extra={**self.extra, **added})

    def with_quantized(self, linear: Linear, q: QTensor) -> Unit:
        """This unit with a linear's weight replaced by a QTensor."""
        return self.with_codes([(linear, q)])

    def with_codes(self, coded: Iterable[tuple[Linear, QTensor]]) -> Unit:
        """This unit with the weights of some linears replaced by QTensors, which lie where those
        lay."""
        by_name = {x.weight_name: (x.name, self.where_it_waits(x, q)) for x, q in coded}
        rest = self.tensors
        if isinstance(rest, Floats):
            rest = rest.without(by_name.keys())
        else:
            rest = {k: v for k, v in rest.items() if k not in by_name}
        return replace(self, tensors=rest, quantized={**self.quantized, **dict(by_name.values())})

    def where_it_waits(self, linear: Linear, codes: QTensor) -> QTensor:
        """Codes, there where the weight whose place they take waits, if it does."""
        home = home_of(self.tensors, linear.weight_name)
        return codes if home is None else codes.to(home)

    def without(self, linears: Iterable[Linear]) -> Unit:
        """This unit with some coded linears as another rank has them: on the meta device here."""
        theirs = {x.name: self.quantized[x.name].to("meta") for x in linears}
        return replace(self, quantized={**self.quantized, **theirs})

    def with_input_scale(self, linear: Linear, scale: Tensor) -> Unit:
        """This unit with the static scale of a linear's input set."""
        scale = scale.detach().to(torch.float32).reshape(1)
        return replace(self, input_scales={**self.input_scales, linear.name: scale})

    def with_divisors(self, divisors: Mapping[str, Tensor]) -> Unit:
        """This unit with the inputs of some sites divided [in] once more."""
        made = dict(self.divisors)
        for site, divisor in divisors.items():
            made[site] = made[site] * divisor if site in made else divisor
        return replace(self, divisors=made)

    @property
    def device(self) -> torch.device | None:
        """Where tensors are read that wait elsewhere; None where none do."""
        return self.tensors.device if isinstance(self.tensors, Floats) else None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Mapping[str, Tensor]:
        """Every original tensor in float, quantized ones as what they stand for, in `dtype`; where
        some wait elsewhere all are made when they are read, in float32."""
        if self.device is not None and isinstance(self.tensors, Floats):
            return self.tensors.replaced({weight_name(n): q for n, q in self.quantized.items()})
        weights = {weight_name(name): q.dequantize(dtype) for name, q in self.quantized.items()}
        return replaced(self.tensors, weights)


class Dequantized(MadeWhenRead):
    """`Unit.dequantized`, each tensor of which is made when it is read; of experts of one shape
    several are made at a time, and held until they are read.

    device  where they are made; if None, where the codes are
    """

    def __init__(
        self, unit: Unit, dtype: torch.dtype, *, device: torch.device | None = None
    ) -> None:
        self._unit, self._dtype, self._device = unit, dtype, device
        self._coded = {weight_name(name): name for name in unit.quantized}
        self.names = dict.fromkeys([*unit.tensors, *self._coded])
        coded = [x for x in unit.layout.linears if x.name in unit.quantized]
        stacks = of_one_shape(coded, self._kind)
        self._stacks = {x.weight_name: stack for stack in stacks if len(stack) > 1 for x in stack}
        self._made: dict[str, Tensor] = {}

    def _kind(self, linear: Linear) -> Hashable:
        spec = self._unit.quantized[linear.name].spec
        return spec if spec.rows_apart else linear.name

    def __getitem__(self, name: str) -> Tensor:
        coded = self._coded.get(name)
        if coded is None:
            plain = self._unit.tensors[name]
            return plain if self._device is None else plain.to(self._device)
        stack = self._stacks.get(name)
        if stack is None:
            return self._codes(coded).dequantize(self._dtype)
        if name not in self._made:
            whole = QTensor.above([self._codes(x.name) for x in stack])
            parts = whole.dequantize(self._dtype).chunk(len(stack))
            self._made |= {x.weight_name: part for x, part in zip(stack, parts, strict=True)}
        return self._made.pop(name)

    def _codes(self, path: str) -> QTensor:
        codes = self._unit.quantized[path]
        return codes if self._device is None else codes.to(self._device)

    def elsewhere(self, name: str) -> bool:
        """As in `Floats`."""
        coded = self._coded.get(name)
        if coded is None:
            return elsewhere(self._unit.tensors, name)
        return self._unit.quantized[coded].codes.is_meta
