"""SmoothAttention (QoQ, arXiv 2405.04532): outlier channels of keys move into the queries.

Attention scores stay what they were: the rows of the query projection are multiplied by λ, those of
the key projection divided by it, with their biases (which the published code forgets). Where keys
and queries are normalised after their projections, the norms' weights take λ, and since all heads
share a norm, one λ serves all of them.

λ = max|K|^α / max|Q|^β: α is 0.5 and β 0 as published for most models, or both are searched by the
error that rounding the keys makes in the attention's output.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import torch
from compressor_calibration.stats import KVNeeds, KVStats
from pydantic import Field, model_validator
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.rows import change_rows, parts_of
from compressor.ir.scheme import KVSpec
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Needs, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.numerics.activations import fake_quantize_kv, static_kv_scale
from compressor.numerics.smooth_attention import attention_candidates, smooth_attention_scales
from compressor.ranks.ranks import Ranks
from compressor.runner.attention_call import AttentionCall


class SmoothAttention(Pass):
    """Even out the channels of keys, for a KV cache of few bits; queries take the difference."""

    targets: str | list[str] = Field(
        default=["attn.k"], description="key projections; the queries that read them change too"
    )
    alpha: float | Literal["search"] = Field(
        0.5,
        description="how much of a channel's size moves: 0 none of it, 1 all; search: alpha and "
        "beta with the least error of the attention's output with keys rounded as kv_cache says",
    )
    beta: float = Field(
        0.0, ge=0, le=1, description="how much of the queries' size counts against it"
    )
    grid: int = Field(20, ge=2, le=1000, description="steps from 0 to 1 that alpha: search tries")
    search_tokens: int = Field(
        1024, ge=1, description="tokens, in whole rows, whose attention alpha: search runs"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.alpha == "search" and self.altered("beta"):
            raise ValueError("beta is searched beside alpha: leave one of them out")
        if self.alpha != "search" and self.altered("grid", "search_tokens"):
            given = " and ".join(self.altered("grid", "search_tokens"))
            raise ValueError(f"{given} says nothing without alpha: search")
        if isinstance(self.alpha, float) and not 0 <= self.alpha <= 1:
            raise ValueError("alpha is a number from 0 to 1, or 'search'")
        return self

    def effects(self) -> Effects:
        return Effects(changes_kv=True)

    def needs(self) -> Needs:
        search = self.alpha == "search"
        return Needs(kv=KVNeeds(tokens=self.search_tokens if search else 0), cache=search)

    def check(self, context: PlanContext) -> Iterator[InputError]:
        layout, config = context.layout, context.config
        hint = "leave smooth_attention out of the recipe"
        shapes = [unit.attention for unit in layout.units if unit.attention is not None]
        if not shapes or any(shape.pairs != "halves" for shape in shapes):
            yield InputError(
                f"{layout.model_type} turns other pairs of channels than smooth_attention assumes"
                if shapes
                else f"{layout.model_type} has no keys by head that could be smoothed",
                hint=hint,
            )
        if any(shape.shared for shape in shapes):
            yield InputError(
                f"blocks of {layout.model_type} read keys of other blocks, which are smoothed for "
                "their own queries alone",
                hint=hint,
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        share = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
        if share not in (None, 1, 1.0):
            yield InputError(
                f"the rotary embedding turns only {share:g} of each head, so channels pair "
                "otherwise than smooth_attention assumes",
                hint=hint,
            )

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        layout, shape = unit.layout, unit.layout.attention
        if not context.selected or shape is None:
            return PassResult(unit)
        observed = context.keys_and_values
        norms = {norm.role: norm for norm in layout.norms if norm.role in ("norm.q", "norm.k")}
        row: dict[str, Any] = {"linear": context.selected[0].name}
        if self.alpha != "search":
            alpha, beta = self.alpha, self.beta
        elif context.cache is None:
            raise RuntimeError("nothing rounds the keys that alpha is searched with")
        else:
            output = next(x for x in layout.linears if x.role == "attn.o")
            tried = attention_candidates(self.grid)
            behind = unit.dequantized()[output.weight_name]
            errors = _errors(
                observed, tried, context.cache, behind, shared=bool(norms), ranks=context.ranks
            )
            best = int(errors.argmin())
            alpha, beta = tried[best]
            row |= {"attention_error": float(errors[best]), "unsmoothed_error": float(errors[0])}
        scales = _scales(observed, alpha, beta, shared=bool(norms))
        row |= {"alpha": alpha, "beta": beta}
        if norms:
            for role, by in (("norm.q", scales[0]), ("norm.k", 1 / scales[0])):
                name = norms[role].weight_name
                offset = norms[role].offset
                norm = unit.tensors[name]
                unit = unit.with_tensors({name: (norm + offset) * by.to(norm) - offset})
        else:
            queries = scales.repeat_interleave(shape.heads // shape.kv_heads, 0).reshape(-1)
            for role, by in (("attn.q", queries), ("attn.k", 1 / scales.reshape(-1))):
                for linear, part in parts_of(layout, role):
                    changed = change_rows(unit.tensors, linear, part, _times(by))
                    unit = unit.with_tensors(changed)
        before = observed.keys
        after = before / scales
        return PassResult(
            unit,
            [
                row
                | {
                    "largest_key": float(before.max()),
                    "key_spread": _spread(before),
                    "key_spread_after": _spread(after),
                }
            ],
        )


def _scales(kv: KVStats, alpha: float, beta: float, *, shared: bool) -> Tensor:
    return smooth_attention_scales(
        kv.keys, alpha=alpha, queries=kv.queries, beta=beta, shared=shared
    )


@torch.no_grad()
def _errors(
    kv: KVStats,
    candidates: Sequence[tuple[float, float]],
    cache: KVSpec,
    output: Tensor,
    *,
    shared: bool,
    ranks: Ranks,
) -> Tensor:
    """float64, for each (α, β): the squared change of the attention's output, behind its output
    projection [hidden, heads·head_dim], from rounding keys that were divided by their scales;
    relative to the output's square.

    The queries take λ and the rounded keys were divided by it: round(K/λ)·λ beside the queries as
    they are gives the same scores.
    """
    parts = []
    scales = [_scales(kv, alpha, beta, shared=shared) for alpha, beta in candidates]
    for place, call in kv.calls:
        found = torch.zeros(len(candidates) + 1, dtype=torch.float64, device=output.device)

        def behind(key: Tensor, call: AttentionCall = call) -> Tensor:
            heads = call.plain(call.query, key, call.value).float()
            return heads.flatten(-2) @ output.float().t()

        wanted = behind(call.key)
        found[-1] += wanted.square().sum(dtype=torch.float64)
        for i, by in enumerate(scales):
            spread = by[None, :, None, :].to(call.key.device)
            static = None if cache.element == "int4" else static_kv_scale(kv.keys / by, cache)
            rounded = fake_quantize_kv(call.key.float() / spread, cache, static) * spread
            change = behind(rounded.to(call.key.dtype)) - wanted
            found[i] += change.square().sum(dtype=torch.float64)
        parts.append((place, found.tolist()))
    every = sorted(part for some in ranks.gather(parts) for part in some)
    found = torch.zeros(len(candidates) + 1, dtype=torch.float64)
    for _, part in every:
        found += torch.tensor(part, dtype=torch.float64)
    errors = found[:-1] / found[-1].clamp(min=1e-30)
    return torch.where(errors.isfinite(), errors, torch.inf)


def _times(by: Tensor) -> Any:
    def change(rows: Tensor) -> Tensor:
        return rows * by.to(rows).view(-1, *[1] * (rows.dim() - 1))

    return change


def _spread(keys: Tensor) -> float:
    """The largest channel over the mean one, averaged over heads; what a shared scale wastes."""
    mean = keys.mean(1).clamp(min=1e-30)
    return float((keys.amax(1) / mean).mean())
