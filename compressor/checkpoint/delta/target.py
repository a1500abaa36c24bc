"""A fine-tune written as its difference to a base: signs in place of weights, and nothing that the
base has as well."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compressor.checkpoint.delta.base import BASE_NAME, Base, delta_shapes
from compressor.checkpoint.target import NONE, ModelTarget
from compressor.ir.layout import Linear, UnitLayout, weight_name
from compressor.ir.qtensor import QTensor
from compressor.ir.tensor import TensorShape
from compressor.ir.unit import Unit
from compressor.numerics.bitdelta import SCALES, SIGNS, SignDelta
from compressor.ranks.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class DeltaTarget(ModelTarget):
    """A delta; its source is the fine-tune.

    bits      module path of a linear → signs for each of its weights
    borrowed  tensors that are not written, because the base has the same
    """

    base: Base
    bits: Mapping[str, int]
    borrowed: frozenset[str] = frozenset()

    def shapes(self, unit: UnitLayout) -> dict[str, TensorShape]:
        """Those of the dense fine-tune, but for what is coded or borrowed."""
        coded = self._coded(unit)
        found: dict[str, TensorShape] = {}
        for name, spec in super().shapes(unit).items():
            if name in coded:
                found |= delta_shapes(coded[name], self.bits[coded[name].name])
            elif name not in self.borrowed:
                found[name] = spec
        return found

    def decode(
        self,
        unit: UnitLayout,
        tensors: Mapping[str, Tensor],
        *,
        coded: Mapping[str, QTensor] = NONE,
        ranks: Ranks = ALONE,
    ) -> Unit:
        """The fine-tune's unit, merged with the base."""
        found = dict(super().decode(unit, tensors, coded=coded, ranks=ranks).tensors)
        weights = self.base_weights(unit)
        for name, linear in self._coded(unit).items():
            signs, scales = (tensors[f"{linear.name}.{leaf}"] for leaf in (SIGNS, SCALES))
            delta = SignDelta(signs, scales, linear.in_features)
            found[name] = delta.merged(weights[name].to(signs.device), self.dtype)
        found |= self.base.source.checkpoint.read(self.borrowed & set(unit.tensors))
        return Unit(layout=unit, tensors=found)

    def config(self) -> dict[str, Any]:
        """It names the base, and what is taken from it."""
        config = super().config()
        config["quantization_config"] |= {
            "bits": min(self.bits.values(), default=0),
            **self.about(),
            "borrowed": sorted(self.borrowed),
        }
        return config

    def files(self) -> dict[str, Any]:
        """The hashes of the base's tensors."""
        assert self.base.record is not None, "the base has not been read"
        return {**super().files(), BASE_NAME: self.base.record.to_json()}

    def about(self) -> dict[str, Any]:
        """The base: where it is from, and its fingerprint once it has been read."""
        record = self.base.record
        fingerprint = record.fingerprint if record else None
        return {"base": {**self.base.identity, "fingerprint": fingerprint}}

    def base_shapes(self, unit: UnitLayout) -> dict[str, TensorShape]:
        """In the base's dtype."""
        dtype = self.base.source.checkpoint.dtype
        return {name: TensorShape(dtype, x.shape) for name, x in self._coded(unit).items()}

    def base_weights(self, unit: UnitLayout) -> dict[str, Tensor]:
        """The base's weights of coded linears, decoded."""
        return self.base.weights(linear.name for linear in self._coded(unit).values())

    def describe(self, linear: str) -> str:
        """How many signs each weight has, if any."""
        if linear in self.bits:
            return f"{self.bits[linear]}-bit difference to the base"
        return "the base's own" if weight_name(linear) in self.borrowed else "unchanged"

    def _is_float(self, linear: Linear) -> bool:
        return linear.name not in self.bits

    def _coded(self, unit: UnitLayout) -> dict[str, Linear]:
        return {x.weight_name: x for x in unit.linears if x.name in self.bits}
