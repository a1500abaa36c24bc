"""SmoothAttention (QoQ, arXiv 2405.04532): outlier channels of keys move into the queries.

Attention scores stay what they were: the rows of the query projection are multiplied by λ, those of
the key projection divided by it, with their biases (which the published code forgets). Where keys
and queries are normalised after their projections, the norms' weights take λ, and since all heads
share a norm, one λ serves all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from compressor.errors import InputError
from compressor.layout import ModelLayout
from compressor.numerics.smooth_attention import smooth_attention_scales
from compressor.parts import change_rows, parts_of
from compressor.passes.base import Pass, PassContext, PassResult, Unit


class SmoothAttention(Pass):
    """Even out the channels of keys, for a KV cache of few bits; queries take the difference."""

    version: ClassVar[int] = 1

    targets: str | list[str] = Field(
        default=["attn.k"], description="key projections; the queries that read them change too"
    )
    alpha: float = Field(
        0.5, ge=0, le=1, description="how much of a channel's size moves: 0 none of it, 1 all"
    )

    def needs_kv(self) -> bool:
        return True

    def check_model(
        self, layout: ModelLayout, config: Mapping[str, Any], *, untied: bool
    ) -> InputError | None:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        share = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
        if share not in (None, 1, 1.0):
            return InputError(
                f"the rotary embedding turns only {share:g} of each head, so channels pair "
                "otherwise than smooth_attention assumes",
                hint="leave smooth_attention out of the recipe",
            )
        return None

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        if not context.selected:
            return PassResult(unit)
        layout, shape = unit.layout, unit.layout.attention
        assert context.kv is not None and shape is not None
        norms = {norm.role: norm for norm in layout.norms if norm.role in ("norm.q", "norm.k")}
        scales = smooth_attention_scales(context.kv.keys, alpha=self.alpha, shared=bool(norms))
        tensors = dict(unit.tensors)
        if norms:
            for role, by in (("norm.q", scales[0]), ("norm.k", 1 / scales[0])):
                name = f"{norms[role].name}.weight"
                offset = norms[role].offset
                tensors[name] = (tensors[name] + offset) * by.to(tensors[name]) - offset
        else:
            queries = scales.repeat_interleave(shape.heads // shape.kv_heads, 0).reshape(-1)
            for role, by in (("attn.q", queries), ("attn.k", 1 / scales.reshape(-1))):
                for linear, part in parts_of(layout, role):
                    tensors |= change_rows(tensors, linear, part, _times(by))
        before = context.kv.keys
        after = before / scales
        return PassResult(
            unit.with_tensors(tensors),
            [
                {
                    "linear": context.selected[0].name,
                    "largest_key": float(before.max()),
                    "key_spread": _spread(before),
                    "key_spread_after": _spread(after),
                }
            ],
        )


def _times(by: Tensor) -> Any:
    def change(rows: Tensor) -> Tensor:
        return rows * by.to(rows).view(-1, *[1] * (rows.dim() - 1))

    return change


def _spread(keys: Tensor) -> float:
    """The largest channel over the mean one, averaged over heads; what a shared scale wastes."""
    mean = keys.mean(1).clamp(min=1e-30)
    return float((keys.amax(1) / mean).mean())


PASS = SmoothAttention
