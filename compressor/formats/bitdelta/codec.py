"""A fine-tune as its difference to a base: a few signs for each weight, and all that is no delta.

What a linear stores is laid out by `compressor.checkpoint.delta.base`, since it means nothing
without its base:
  NAME.delta_signs   int32 [bits, ceil(in / 32), out], see `pack_signs`
  NAME.delta_scales  float32 [bits]
Every other tensor is stored as in a dense checkpoint, or left out where the base has the same.
config.json is the fine-tune's own; its `quantization_config` names the base. base.json holds the
hash of each of the base's tensors.
"""

from collections.abc import Mapping
from typing import Any

from compressor.errors import InputError
from compressor.formats.base import Headers, ModelSchemes
from compressor.formats.dense.codec import Dense
from compressor.ir.scheme import Scheme


class BitDelta(Dense):
    """A dense checkpoint in which the pass `bitdelta` replaces weights by signs."""

    name = "bitdelta"

    def accepts(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """No codes: a delta has signs instead."""
        if scheme != Scheme():
            return "a delta holds differences to a base; only the pass bitdelta makes them"
        return None

    def config(self, schemes: ModelSchemes) -> dict[str, Any]:
        """Which method it is; the plan adds what it knows of the base."""
        super().config(schemes)
        return {"quant_method": "bitdelta"}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """By the method's name."""
        return config.get("quant_method") == "bitdelta"

    def schemes(self, config: Mapping[str, Any], linears: Mapping[str, Headers]) -> ModelSchemes:
        """Always refused: a delta alone is no model."""
        raise InputError(
            "this checkpoint is a delta, which means nothing without its base",
            hint="compress delta apply BASE DELTA OUT makes a model of both; "
            "eval and verify take --base",
        )


FORMAT = BitDelta()
