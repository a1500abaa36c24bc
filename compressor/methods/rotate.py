"""Rotation of the residual stream (QuaRot, arXiv 2404.00456; QoQ, arXiv 2405.04532).

With R orthogonal, x → x R leaves the root mean square of x as it is, so a model whose norms only
normalise computes the same in the rotated basis:
    embedding                   E → E R
    what reads a norm           W → W·diag(γ)·R, with γ the norm's weight, which becomes 1
    what is added to the stream W → Rᵀ W, its bias b → b R
Outliers that sit in a few channels of the stream are spread over all of them.

A LayerNorm also subtracts the mean, x·(I − 11ᵀ/n): a rotation that leaves the vector of ones where
it is commutes with that. A norm's bias β goes into the biases of what reads it, or, where one has
none, becomes (β/γ) R.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.floats import replaced
from compressor.ir.layout import Linear, Norm, UnitLayout
from compressor.ir.rows import change_rows, parts_of
from compressor.ir.unit import Unit
from compressor.methods.base import Effects, Pass
from compressor.methods.common.context import PassContext, PassResult, PlanContext
from compressor.numerics.hadamard import Rotation, rotation

POST_NORMS = ("norm.attn.out", "norm.mlp.out", "norm.embedding")


class Rotate(Pass):
    """Rotate the hidden states by a Hadamard matrix, so that no channel is an outlier."""

    seed: int | None = Field(
        None, ge=0, description="random signs from this seed; null for the plain Hadamard matrix"
    )
    heads: bool = Field(
        True, description="also rotate the channels of each head between v and o projection"
    )
    keep_mean: bool = Field(
        False, description="a rotation that leaves means as they are, which LayerNorm models need"
    )

    @model_validator(mode="after")
    def _everything_turns(self) -> Self:
        if self.altered("targets", "ignore"):
            raise ValueError("rotate turns the whole residual stream; it has no targets or ignore")
        return self

    def effects(self) -> Effects:
        return Effects(works_on="all", rotates_residual=True, changes_kv=True)

    def check(self, context: PlanContext) -> Iterator[InputError]:
        layout = context.layout
        norms = [norm for unit in layout.units for norm in unit.norms]
        post = next((norm for norm in norms if norm.role in POST_NORMS), None)
        if post is not None:
            yield InputError(
                f"{layout.model_type} normalises what is added to the stream ({post.name}), and "
                "that norm's weight does not commute with a rotation",
                hint="leave rotate out of the recipe",
            )
        elif any(norm.kind == "layer" for norm in norms) and not self.keep_mean:
            yield InputError(
                f"{layout.model_type} has LayerNorms, which subtract the mean",
                hint="keep_mean: true rotates around it",
            )
        if layout.carried:
            yield InputError(
                f"{len(layout.carried)} tensors that are carried over ({layout.carried[0]}, …) "
                "write to the hidden states or read them as they were, not rotated",
                hint="leave rotate out of the recipe",
            )
        latent = next((x for x in layout.linears if x.role.startswith("latent.")), None)
        if latent is not None:
            yield InputError(
                f"experts of {layout.model_type} read a latent ({latent.name}), not the stream",
                hint="leave rotate out of the recipe",
            )
        if layout.tied is not None and not context.untied:
            yield InputError(
                "the final norm's weight goes into lm_head, which shares its weight with "
                f"{layout.tied}",
                hint="write it separately with untie: true at the top of the recipe",
            )

    def apply(self, unit: Unit, context: PassContext) -> PassResult:
        layout = unit.layout
        size = _stream(unit)
        turn = rotation(size, seed=self.seed, keep_mean=self.keep_mean)
        if layout.kind == "embedding":
            turned = {name: turn.right(unit.tensors[name]) for name in layout.tensors}
            return PassResult(unit.with_tensors(turned))
        unit = unit.with_tensors(rotated_stream(layout, unit.tensors, turn))
        # A gate of each channel, between v and o, does not commute with a rotation, and values that
        # other blocks read stay as they are.
        shape, gated = layout.attention, parts_of(layout, "attn.gate")
        if self.heads and shape is not None and not shape.shared and not gated:
            small = rotation(shape.head_dim, seed=self.seed)
            unit = unit.with_tensors(_turned_heads(unit, small))
        return PassResult(replace(unit, divisors={}))


class Turn(Protocol):
    """An orthogonal matrix R [n, n]."""

    def right(self, x: Tensor) -> Tensor:
        """x R for x [..., n], in x's dtype."""

    def left(self, x: Tensor) -> Tensor:
        """Rᵀ x for x [n, m]."""


def rotated_stream(
    layout: UnitLayout, tensors: Mapping[str, Tensor], turn: Turn
) -> dict[str, Tensor]:
    """All tensors of a block or the head that change where the residual stream is x R for x."""
    changed: dict[str, Tensor] = {}
    for norm in layout.norms:
        readers = _readers(layout, norm)
        if readers:
            changed |= _into_readers(replaced(tensors, changed), norm, readers, turn)
    for linear in layout.linears:
        # Its output is added to the stream.
        if linear.role in ("attn.o", "linear.out") or linear.role.endswith(".down"):
            now, name, bias = replaced(tensors, changed), linear.weight_name, linear.bias_name
            changed[name] = turn.left(now[name])
            if bias in now:
                changed[bias] = turn.right(now[bias])
    return changed


def _stream(unit: Unit) -> int:
    """Channels of the residual stream."""
    layout = unit.layout
    if layout.kind == "embedding":
        return unit.tensors[layout.tensors[0]].shape[1]
    return next(
        x.in_features for x in layout.linears if x.site in ("attn.in", "block.in", "head.in")
    )


def _readers(layout: UnitLayout, norm: Norm) -> tuple[Linear, ...]:
    """The linears that read what a norm gives out; none for norms inside the attention."""
    if norm.role == "norm.final":
        return layout.site_linears("head.in")
    if norm.role not in ("norm.attn", "norm.mlp"):
        return ()
    sites = [fold.site for fold in layout.folds if fold.source == norm.name]
    return tuple(linear for site in sites for linear in layout.site_linears(site))


def _into_readers(
    tensors: Mapping[str, Tensor], norm: Norm, readers: tuple[Linear, ...], turn: Turn
) -> dict[str, Tensor]:
    """A norm's weight and bias moved into what reads it, which then reads the rotated stream."""
    stored = tensors[norm.weight_name]
    weight = stored.double() + norm.offset
    changed = {norm.weight_name: torch.full_like(stored, 1 - norm.offset)}
    bias = tensors.get(norm.bias_name)
    takes = all(linear.bias_name in tensors for linear in readers)
    if bias is not None and takes:
        changed[norm.bias_name] = torch.zeros_like(bias)
    elif bias is not None:
        if not bool((weight != 0).all()):
            raise InputError(f"{norm.name} has weights of 0: its bias cannot be rotated")
        changed[norm.bias_name] = turn.right(bias.double() / weight).to(bias.dtype)
    for linear in readers:
        name = linear.weight_name
        old = tensors[name]
        if bias is not None and takes:
            own = tensors[linear.bias_name]
            added = old.double() @ bias.double()
            changed[linear.bias_name] = (own.double() + added).to(own.dtype)
        changed[name] = turn.right(old.double() * weight).to(old.dtype)
    return changed


def _turned_heads(unit: Unit, turn: Rotation) -> dict[str, Tensor]:
    """v's outputs and o's inputs with the channels of each head rotated alike."""
    changed: dict[str, Tensor] = {}

    def rows(value: Tensor) -> Tensor:
        flat = value.reshape(-1, turn.size, value[0].numel()).transpose(1, 2)
        return turn.right(flat).transpose(1, 2).reshape(value.shape)

    for linear, part in parts_of(unit.layout, "attn.v"):
        changed |= change_rows(unit.tensors, linear, part, rows)
    for linear in unit.layout.linears:
        if linear.role == "attn.o":
            weight = unit.weight(linear)
            heads = weight.view(weight.shape[0], -1, turn.size)
            changed[linear.weight_name] = turn.right(heads).view(weight.shape)
    return changed
