"""BLASST (arXiv 2512.12087), TensorRT-LLM's skip softmax: tiles of keys whose softmax weights are
negligible are skipped, by a threshold that a wanted share of skipped tiles asks for."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from compressor_kernels.attention.skip_softmax import (
    SkipTiles,
    kept_mask,
    skip_decode,
    skip_prefill,
    tile_gaps_ref,
)
from pydantic import Field, model_validator
from torch import Tensor

from compressor import __version__
from compressor.attention.key_blocks import by_kernel
from compressor.attention.masked import OwnAttention
from compressor.attention.policy import AttentionPolicy
from compressor.attention.rule import Rule, RuleCall, Seen, Value, share_of

FORMULA = "a * exp(b * target_sparsity)"
"""What ModelOpt calls the scale of thresholds."""


LARGEST = 88.0
"""Logarithm of what a kernel's float holds."""


class SkipPhase(Value):
    """What was fitted for prompts or for steps: the threshold of a text of L keys is
    a · exp(b · sparsity) / L.

    sparsity  wanted share of skipped tiles
    lengths   shortest and longest text of the fit;  shares  least and largest share that it holds
              for, None where that is not known
    """

    a: float = Field(gt=0)
    b: float = Field(ge=0)
    sparsity: float = Field(gt=0, lt=1)
    lengths: tuple[int, int] = Field(strict=False)
    shares: tuple[float, float] | None = Field(None, strict=False)

    @model_validator(mode="after")
    def _calibrated(self) -> Self:
        if not 1 <= self.lengths[0] <= self.lengths[1]:
            raise ValueError(f"lengths {list(self.lengths)} are not a shortest and a longest text")
        if self.shares is not None and not self.shares[0] <= self.sparsity <= self.shares[1]:
            least, most = self.shares
            raise ValueError(
                f"a share of {self.sparsity:.1%} is outside the {least:.1%} to {most:.1%} that "
                "were calibrated"
            )
        if math.log(self.a) + self.b * self.sparsity > LARGEST:
            raise ValueError(f"a {self.a:g} and b {self.b:g} give no threshold")
        return self

    def threshold(self, length: int) -> float:
        """Of a text of `length` keys; 1 and more: every tile but the first would go."""
        return self.a * math.exp(self.b * self.sparsity) / length


class Blasst(Rule):
    """Tiles of `rows` queries by `keys` keys are skipped where they lie far below what was seen.

    The threshold is that of the keys of a call, as in TensorRT-LLM: a chunk of a prompt has another
    than the whole. Texts so short that it would be 1 are attended to whole.
    """

    title: ClassVar[str] = "BLASST"

    prefill: SkipPhase | None = None
    decode: SkipPhase | None = None
    rows: int = Field(128, ge=1)
    keys: int = Field(128, ge=1)
    targets: tuple[str, ...] = Field((), strict=False)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.prefill is None and self.decode is None:
            raise ValueError("there is a threshold neither for prompts nor for steps")
        return self

    @property
    def fitted(self) -> int | None:
        return max(phase.lengths[1] for phase in (self.prefill, self.decode) if phase is not None)

    def _threshold(self, call: RuleCall) -> float:
        phase = self.decode if call.query.shape[2] == 1 else self.prefill
        return 0.0 if phase is None else phase.threshold(call.key.shape[2])

    def seen(self, call: RuleCall) -> Seen:
        q_len, k_len = call.query.shape[2], call.key.shape[2]
        limit, packed = self._threshold(call), q_len == 1
        rows = 1 if packed else self.rows
        gaps = tile_gaps_ref(
            call.query, call.key, rows=rows, keys=self.keys, packed=packed, scale=call.scaling
        )
        skipped = gaps < (math.log(limit) if 0 < limit < 1 else -math.inf)

        def mask(part: slice) -> Tensor:
            return kept_mask(skipped, q_len, k_len, rows=rows, keys=self.keys, part=part)

        return mask

    def attend(self, call: RuleCall, value: Tensor, own: OwnAttention) -> Tensor:
        limit = self._threshold(call)
        kernel = own.softcap is None and own.window is None and by_kernel(call.key)
        if not kernel or not 0 < limit < 1:
            return super().attend(call, value, own)
        tiles = SkipTiles(rows=self.rows, keys=self.keys)
        run = skip_decode if call.query.shape[2] == 1 else skip_prefill
        return run(call.query, call.key, value, threshold=limit, scale=own.scaling, tiles=tiles).out

    def config(self) -> dict[str, Any]:
        """ModelOpt's `sparse_attention_config`; TensorRT-LLM reads the coefficients and the
        targets."""
        phases = {"prefill": self.prefill, "decode": self.decode}
        fits = {name: phase for name, phase in phases.items() if phase is not None}
        return {
            "sparse_attention_config": {
                "config_groups": {
                    "group_0": {
                        "algorithm": "skip_softmax",
                        "targets": list(self.targets),
                        "threshold_scale_factor": {
                            "formula": FORMULA,
                            **{name: {"a": fit.a, "b": fit.b} for name, fit in fits.items()},
                        },
                        "target_sparsity": {name: fit.sparsity for name, fit in fits.items()},
                    }
                },
                "producer": {"name": "compressor", "version": __version__},
            }
        }

    @classmethod
    def describe(cls, rules: Sequence[Self], policy: AttentionPolicy) -> list[str]:
        rule = rules[0]
        wanted = [
            f"{phase.sparsity:.0%} in {name}"
            for name, phase in (("prefill", rule.prefill), ("decode", rule.decode))
            if phase is not None
        ]
        return [
            f"{share_of(rules, policy)} skip tiles of {rule.rows} x {rule.keys} by "
            f"BLASST's threshold for {' and '.join(wanted)}"
        ]
